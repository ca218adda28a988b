"""Reject codes of all stages: one sentence per reason to leave an item out. A code never changes its meaning and is never reused."""

from dataclasses import dataclass

from align.common.errors import DataError

MAX_DETAIL = 500  # characters of a detail that are kept

SAMPLE_CODES: dict[str, str] = {
    # images
    "image_missing": "the row has no image: no such member, an empty cell, null or NaN",
    "image_ambiguous": "the sample has several images and none has the suffix that was asked for",
    "image_type": "the image cell is neither bytes, nor a path, nor a struct of bytes and path",
    "image_empty": "the image has no bytes",
    "image_format": "not an accepted image format, judged by content: HTML, SVG, EPS, PDF, gzip, a cut header, ...",
    "image_pixels": "the header announces more pixels than Limits.max_pixels",
    "image_small": "the shorter side is below Limits.min_side",
    "image_aspect": "the longer side is more than Limits.max_aspect times the shorter",
    "image_damaged": "the header is good but the content is cut, fails its checksum or expands beyond Pillow's limits",
    "image_nonfinite": "a float image with NaN or infinity",
    "image_range": "16-bit gray with a value above the white that --gray-bits says",
    # image files and archive members
    "unsafe_path": "a URL, or a path outside the image folder or archive",
    "file_missing": "no file at that path (it may have vanished since the manifest was made)",
    "file_denied": "no permission to read the file",
    "file_kind": "a folder, pipe, device or link loop where a file is expected",
    "file_large": "more bytes than a sample may have; not read",
    "file_unreadable": "the operating system could not read the file",
    "archive_link": "a link or device in the archive; never followed",
    "archive_truncated": "the archive is cut or damaged here; its later samples are lost",
    # rows and keys
    "row_blank": "an empty line",
    "row_large": "a line longer than a row may be; not read",
    "row_syntax": "not valid JSON or CSV: open quotes, huge fields, too many cells, nesting too deep",
    "row_type": "the row is valid JSON but not an object",
    "row_duplicate_name": "a JSON object names a column twice",
    "row_utf8": "bytes that are not UTF-8",
    "row_unreadable": "a parquet row group that does not decode",
    "missing_column": "a column that other rows have is missing here",
    "key_missing": "the key is empty, null or NaN",
    "key_invalid": "the key is not text or a whole number, or holds NUL or a lone surrogate",
    "key_large": "the key has more than 512 bytes",
    "duplicate_key": "another row has this key; the first one is kept",
    # captions
    "caption_missing": "the caption is null, NaN, or an empty list",
    "caption_empty": "the caption is empty or blank",
    "caption_type": "the caption is not text",
    "caption_large": "more characters than Limits.max_caption_chars",
    "caption_invalid": "the caption holds NUL or a lone surrogate",
    "caption_count": "more captions than Limits.max_captions",
}

FEATURE_CODES: dict[str, str] = {
    "zero_feature": "the encoder gave only zeros",
    "nonfinite_feature": "the encoder gave NaN, infinity, or numbers beyond fp16",
}

CONVERSATION_CODES: dict[str, str] = {  # their order is stored in indexes of conversations: only append
    "row_fields": "not one of conversations, messages and texts, or not a list of objects with role and content (from and value)",
    "content_type": "a text that is no text, or a part that is neither text nor image",
    "text_invalid": "a text holds NUL, a lone surrogate or bytes that are not UTF-8",
    "text_large": "more characters than a conversation may have",
    "special_text": "a text spells a special token that the tokenizer cannot write as plain text",
    "role_unknown": "a role that is neither system, human or user, nor gpt or assistant",
    "role_order": "the turns are not (system), user, assistant, user, assistant, ...",
    "empty_question": "a question without words and images",
    "empty_answer": "an answer without words",
    "image_count": "not one <image> for each image",
    "image_role": "an image that is not in a question",
    "template": "the chat template refuses the row",
    "too_long": "the first turn alone has more tokens than the maximum length",
    "no_supervised_tokens": "no token of the row would be learned",
    "row_key": "a key that is not read and may change what the row means, such as video, tools, or a weight between 0 and 1",
    "prompt_seam": "the prompt is not the beginning of the row, token by token: the model would be asked other tokens than it learned",
    "image_description": "a described image is not text or regions of text and box, or a text of it has no vector",
}

REJECT_CODES = SAMPLE_CODES | FEATURE_CODES | CONVERSATION_CODES


_TASK = "(of a task: `image_root`)"
ADVICE = {  # for codes that say what to do; of others the data is to be mended
    "file_missing": f"Image paths start at the table's folder or at --image-root {_TASK}: give the right one, or take such rows out.",
    "unsafe_path": f"Images have to lie below one folder: give one above all of them as --image-root {_TASK}. Nothing is downloaded.",
    "image_missing": "Is --image-column the column of the images?",
    "image_type": "Is --image-column the column of the images?",
    "image_ambiguous": "Give the suffix of one of them as --image-column, for example --image-column input.jpg.",
    "image_range": "Give a larger --gray-bits (of a task: `gray_bits`).",
    "file_denied": "Let yourself read the files (chmod), or run as a user who may.",
    "missing_column": "Name a column that the rows have.",
    "caption_type": "Name a column of texts.",
}


def advice(code: str, otherwise: str = "Mend the data.") -> str:
    """Return what to do if most samples have this code."""
    return ADVICE.get(code, otherwise)


class Reject(DataError):
    """An item cannot be used. `code`: key of REJECT_CODES; `detail`: what was found. Callers count it and go on, or it ends the command."""

    def __init__(self, code: str, detail: str = "") -> None:
        assert code in REJECT_CODES, code
        super().__init__(code, detail)
        self.code, self.detail = code, detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail or REJECT_CODES[self.code]}"


@dataclass(frozen=True)
class RejectedRow:
    """A reject and its place: `row` of a shard or file, and `column` (row, image, feature, conversation or a caption column)."""

    row: int
    key: str  # of the sample, or a conversation's id
    column: str
    code: str
    detail: str  # at most MAX_DETAIL characters
    source: str = ""  # file and row number, where `row` alone does not say it

    @classmethod
    def of(cls, reject: Reject, row: int, key: str, column: str, source: str = "") -> "RejectedRow":
        """Return the record of `reject`."""
        return cls(row, key, column, reject.code, reject.detail[:MAX_DETAIL], source)
