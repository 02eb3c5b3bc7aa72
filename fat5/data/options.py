"""The typed `data` and `mixture` sections of a recipe."""

from dataclasses import dataclass, replace
from typing import Literal

from fat5.data.denoisers import MIXTURES, Denoiser


@dataclass(frozen=True)
class CorpusOptions:
    """One source of text: either `files` or `dataset`.

    Attributes:
        files: local files; `*` and `**` are expanded; read in sorted order of each pattern.
        dataset: a name, or folder, for `datasets.load_dataset`.
        format: what the files are. `text`: plain UTF-8; `jsonl`: one JSON object a line; `parquet`: needs
            `datasets`; null tells by each file's suffix, `text` for an unknown one.
        documents: what a document is in a `text` file: a paragraph between blank lines, a line, or the whole
            file.
        field: the key (jsonl) or column (parquet, dataset) that holds the text.
        config: the configuration of `dataset`.
        split: the split of `dataset`.
        revision: the Git revision of `dataset`; a branch, or null for the main one, stands for the commit that it is at
            when the corpus is tokenised or the run begins.
        invalid_utf8: `refuse` stops with the file and place; `replace` puts U+FFFD where bytes are wrong.
        weight: its share of the training tokens, relative to the other corpora's weights. Either all corpora
            of a recipe have one or none; without weights every window of every corpus comes once in an epoch.
            For replay, give the original domain a small weight beside the new one.
        streaming: read the corpus as a stream while training, tokenised on the fly and not stored.
    """

    files: tuple[str, ...] = ()
    dataset: str | None = None
    format: Literal["text", "jsonl", "parquet"] | None = None
    documents: Literal["blank_line", "line", "file"] = "blank_line"
    field: str = "text"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    invalid_utf8: Literal["refuse", "replace"] = "refuse"
    weight: float | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if bool(self.files) == (self.dataset is not None):
            raise ValueError("give either files or dataset, and not both")
        if self.weight is not None and not self.weight >= 0:
            raise ValueError(f"weight must be 0 or more, not {self.weight}")

    @property
    def name(self) -> str:
        """Say which corpus it is, for messages."""
        return self.dataset if self.dataset is not None else ", ".join(self.files)


@dataclass(frozen=True)
class StageOptions:
    """A stage of a curriculum: other weights from some step on.

    Attributes:
        from_step: the first step of the stage; it begins with the first block of examples planned from then
            on.
        weights: one for each training corpus, in their order; 0 leaves a corpus out.
    """

    from_step: int
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.from_step < 1:
            raise ValueError("from_step must be at least 1; the corpora's own weights hold from step 0")
        if any(w < 0 for w in self.weights) or not sum(self.weights):
            raise ValueError("weights must be 0 or more, and one of them above 0")


@dataclass(frozen=True)
class DataOptions:
    """What the model is trained and evaluated on.

    Attributes:
        train: the training corpora.
        evaluation: the held-out corpora; may be empty.
        max_input_length: most tokens of an encoder input, mode token and EOS included.
        max_target_length: most tokens of a target, sentinels and EOS included.
        window: raw tokens that one example is made from; documents are cut into consecutive windows of this
            length, the last one shorter. null takes the longest that fits both maxima under every denoiser of
            the mixture; with `packing: segments`, the longest with which rows are filled to 97 %.
        cache: folder of the tokenised corpora; null is `fat5/tokens` in the user's cache folder.
        sentinels: the model family whose sentinel ids to use (`t5`, `mt5`, `umt5`, `byt5`); `auto` recognises
            the family by its tokenizer, else takes the tokens named `<extra_id_N>`.
        packing: `none`: one example a row, padded to the longest of the batch. `segments`: several examples
            in each row of max_input_length and max_target_length, which do not see each other. `stream`: a
            whole batch of that many tokens as one flat sequence without padding, for the `fat5` attention;
            the others take it too, with a mask as large as the square of the batch's tokens.
        stages: the curriculum after the first stage, which has the corpora's own weights.
    """

    train: tuple[CorpusOptions, ...]
    evaluation: tuple[CorpusOptions, ...] = ()
    max_input_length: int = 512
    max_target_length: int = 512
    window: int | None = None
    cache: str | None = None
    sentinels: Literal["auto", "t5", "mt5", "umt5", "byt5"] = "auto"
    packing: Literal["none", "segments", "stream"] = "none"
    stages: tuple[StageOptions, ...] = ()

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train is empty; name at least one corpus")
        weights = [c.weight for c in self.train]
        if None in weights and any(w is not None for w in weights):
            raise ValueError("give all training corpora a weight, or none")
        if weights[0] is not None and not sum(w or 0 for w in weights):
            raise ValueError("one of the training corpora must have a weight above 0")
        if any(len(stage.weights) != len(self.train) for stage in self.stages):
            raise ValueError(f"each stage needs {len(self.train)} weights, one for each training corpus")
        steps = [stage.from_step for stage in self.stages]
        if steps != sorted(set(steps)):
            raise ValueError("stages must be in the order of their from_step")
        if len({c.streaming for c in self.train}) > 1:
            raise ValueError("either all training corpora are streaming, or none")
        if len(self.train) > 1 and self.train[0].streaming and None in weights:
            raise ValueError("several streamed corpora need weights: a stream does not tell its size")
        if self.max_input_length < 8 or self.max_target_length < 8:
            raise ValueError("max_input_length and max_target_length must be at least 8")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, not {self.window}")

    def weights(self) -> list[tuple[int, tuple[float, ...] | None]]:
        """Give the first step of each stage, and its weights; None for none."""
        first = tuple(c.weight for c in self.train if c.weight is not None)
        return [(0, first or None), *((stage.from_step, stage.weights) for stage in self.stages)]


@dataclass(frozen=True)
class MixtureOptions:
    """How the text is corrupted.

    Attributes:
        name: a mixture of `fat5.data.denoisers.MIXTURES`; not used when `denoisers` are given.
        denoisers: one's own mixture.
        mode_tokens: false drops the mode tokens.
        prefix_split: how prefix denoisers cut the window: `uniform`, or `fixed_prefix`; null leaves each
            denoiser's own.
        fixed_prefix: the share of the window that is input, with `prefix_split: fixed_prefix`.
        prefix_sentinel: whether the first sentinel marks the cut; null leaves each denoiser's own.
        random_roll: turn each span mask by a random offset, so that masked positions are uniform; false is
            T5's default, under which a window always ends in a masked span.
    """

    name: str = "ul2_fat5"
    denoisers: tuple[Denoiser, ...] = ()
    mode_tokens: bool = True
    prefix_split: Literal["uniform", "fixed_prefix"] | None = None
    fixed_prefix: float = 0.25
    prefix_sentinel: bool | None = None
    random_roll: bool = True

    def __post_init__(self) -> None:
        if not self.denoisers and self.name not in MIXTURES:
            raise ValueError(f"name {self.name!r} is no mixture; known: {', '.join(MIXTURES)}")
        if not 0 < self.fixed_prefix < 1:
            raise ValueError(f"fixed_prefix must be above 0 and below 1, not {self.fixed_prefix}")

    def resolved(self) -> tuple[Denoiser, ...]:
        """Give the denoisers with all options laid over them."""
        return tuple(self._adjusted(d) for d in self.denoisers or MIXTURES[self.name])

    def _adjusted(self, denoiser: Denoiser) -> Denoiser:
        if not self.mode_tokens:
            denoiser = replace(denoiser, mode=None)
        if denoiser.kind == "prefix":
            if self.prefix_split is not None:
                fixed = self.prefix_split == "fixed_prefix"
                denoiser = replace(denoiser, prefix=self.fixed_prefix if fixed else None)
            if self.prefix_sentinel is not None:
                denoiser = replace(denoiser, sentinel=self.prefix_sentinel)
        return denoiser
