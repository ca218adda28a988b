"""The entry point `lmms_eval.models`: the name `sail_llava` and the path of its class.

Import nothing else here: lmms-eval swallows errors of this module and then reports that the model does not exist.
"""

from lmms_eval.models.registry_v2 import ModelManifest

manifest = ModelManifest(model_id="sail_llava", simple_class_path="eval.harness.adapter.SailLlava")
