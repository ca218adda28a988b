"""What lmms-eval finds through the entry point `lmms_eval.models`: the name `sail_llava` and where its class lives.

Nothing else may be imported here: lmms-eval swallows an error of this module and then says that the model does not exist.
"""

from lmms_eval.models.registry_v2 import ModelManifest

manifest = ModelManifest(model_id="sail_llava", simple_class_path="eval.harness.adapter.SailLlava")
