"""How the embedded embedder is made: texts -> a tokenizer and one vector per token, no transformer behind it.

A text's embedding is the mean of its tokens' vectors, so a vector carries both what its token means and how much it
counts. Two stages, both on one CPU core within minutes, and the same for the same texts and seed:

1. meaning from company: positive pointwise mutual information of tokens that stand near each other, factored by a
   truncated SVD (Levy, Goldberg and Dagan 2015, "Improving Distributional Similarity with Lessons Learned from Word
   Embeddings"), each vector scaled by how rare its token is (Arora et al. 2017, "A Simple but Tough-to-Beat Baseline
   for Sentence Embeddings");
2. meaning from use: pairs of a question and its passage are pulled together, against the other passages of the batch
   (van den Oord et al. 2018, arXiv:1807.03748).

Owns nothing of files: texts and pairs are passed in. Serving does not import this module.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

UNKNOWN = "[UNK]"
_WORD_START = "▁"
_ALPHABET_SIZE = 200
Pair = tuple[str, str]


@dataclass(frozen=True)
class StaticEmbedderSettings:
    vocab_size: int = 8192
    width: int = 512
    window: int = 8
    """Tokens to each side that count as company."""
    rarity: float = 1e-3
    """A token that makes up this share of the text has half of a rare token's weight."""
    epochs: int = 1
    """Passes over the pairs; 0 leaves out the second stage."""
    batch_size: int = 2048
    """Pairs at once; each question is told from the passages of all the others, so large batches teach more."""
    learning_rate: float = 1e-2
    scale: float = 20.0
    """Cosine similarities are multiplied by this before the softmax over a batch."""
    lexical: float = 0.5
    """Share of each starting vector that is random, and so its token's own: what keeps names and rare terms apart."""
    seed: int = 0


def train_static_embedder(
    texts: Sequence[str],
    pairs: Sequence[Pair],
    *,
    settings: StaticEmbedderSettings,
    log: Callable[[str], None] = print,
) -> tuple[Tokenizer, np.ndarray]:
    """(tokenizer, float32 [vocab, width]) learned from `texts` and (question, passage) `pairs`."""
    tokenizer = train_tokenizer(texts, vocab_size=settings.vocab_size)
    documents = _encode(tokenizer, texts)
    log(f"tokenizer: {tokenizer.get_vocab_size()} tokens; texts: {sum(map(len, documents))} tokens")
    vectors = cooccurrence_vectors(documents, vocab_size=tokenizer.get_vocab_size(), settings=settings)
    log(f"first stage: vectors {list(vectors.shape)} from co-occurrence")
    vectors[_silent_tokens(tokenizer)] = 0
    if settings.epochs and pairs:
        vectors = train_on_pairs(tokenizer, vectors, pairs, settings=settings, log=log)
    return tokenizer, vectors


def save_static_embedder(folder: Path, tokenizer: Tokenizer, vectors: np.ndarray) -> None:
    """Write a folder that a stock `SentenceTransformer(folder)` opens: safetensors, no code, no pickle.

    The weights are stored as model2vec stores them, which sentence-transformers reads too: int8, and a factor for each
    token. At a size on disk that is twice the width of float16, and width is what keeps tokens apart.
    """
    from safetensors.numpy import save_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    module = StaticEmbedding(tokenizer, embedding_weights=np.ascontiguousarray(vectors, dtype=np.float32))
    SentenceTransformer(modules=[module, Normalize()], device="cpu").save(str(folder), create_model_card=False)
    factors = np.abs(vectors).max(axis=1) / 127  # [vocab]
    rounded = np.rint(vectors / np.where(factors > 0, factors, 1)[:, None]).astype(np.int8)
    save_file({"embeddings": rounded, "weights": factors.astype(np.float32)}, folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def train_tokenizer(texts: Sequence[str], *, vocab_size: int) -> Tokenizer:
    """An uncased BPE tokenizer: words that are common in `texts` stay whole, others fall into pieces.

    Not WordPiece, whose trainer in `tokenizers` breaks ties by the order of a hash map, anew in every run.
    """
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    # words and single punctuation marks, each with a mark where it begins: "▁shear" + "ing"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Metaspace(prepend_scheme="always", split=False)]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    alphabet = _alphabet(tokenizer, texts)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNKNOWN],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def cooccurrence_vectors(
    documents: Sequence[np.ndarray], *, vocab_size: int, settings: StaticEmbedderSettings
) -> np.ndarray:
    """float32 [vocab_size, width]: the direction says a token's company, the length how rare it is."""
    from sklearn.utils.extmath import randomized_svd  # type: ignore[import-untyped]

    counts = _cooccurrences(documents, vocab_size=vocab_size, window=settings.window)
    random = np.random.default_rng(settings.seed)
    # ARPACK's svds is exact, but gives another basis in each run where singular values are alike.
    left, strengths, _ = randomized_svd(_ppmi(counts), n_components=settings.width, random_state=settings.seed)
    # The square root of the singular values is what Levy et al. found best for similarity.
    meaning = left * np.sqrt(strengths)
    meaning -= meaning.mean(axis=0)  # what all tokens share says nothing
    noise = random.standard_normal(meaning.shape)
    mixed = np.sqrt(1 - settings.lexical) * _unit(meaning) + np.sqrt(settings.lexical) * _unit(noise)
    frequency = np.bincount(np.concatenate(documents), minlength=vocab_size)
    rarity = settings.rarity / (settings.rarity + frequency / frequency.sum())
    rarity[frequency == 0] = 0  # letters that only ever stood within longer tokens: nothing is known of them
    return np.ascontiguousarray(mixed * rarity[:, None], dtype=np.float32)


def train_on_pairs(
    tokenizer: Tokenizer,
    vectors: np.ndarray,
    pairs: Sequence[Pair],
    *,
    settings: StaticEmbedderSettings,
    log: Callable[[str], None] = print,
) -> np.ndarray:
    """`vectors` [vocab, width] after pulling each question towards its passage; the input is left as it is.

    By sentence-transformers' trainer, which needs `pip install 'pacos[pretrain]'`.
    """
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import PrinterCallback

    torch.manual_seed(settings.seed)
    module = StaticEmbedding(tokenizer, embedding_weights=vectors.copy())
    silent = torch.tensor(_silent_tokens(tokenizer))
    module.embedding.weight.register_hook(lambda gradient: gradient.index_fill(0, silent, 0))
    model = SentenceTransformer(modules=[module], device="cpu")
    loss = MultipleNegativesRankingLoss(
        model, scale=settings.scale, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    questions, passages = zip(*pairs, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=_training_arguments(folder, num_pairs=len(pairs), settings=settings),
            train_dataset=Dataset.from_dict({"question": questions, "passage": passages}),
            loss=loss,
        )
        trainer.remove_callback(PrinterCallback)
        trained = trainer.train()
    log(f"second stage: {trained.global_step} steps, mean loss {trained.training_loss:.3f}")
    return module.embedding.weight.detach().numpy()


def _training_arguments(folder: str, *, num_pairs: int, settings: StaticEmbedderSettings) -> Any:
    from sentence_transformers import SentenceTransformerTrainingArguments

    return SentenceTransformerTrainingArguments(
        output_dir=folder,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=min(settings.batch_size, num_pairs),
        dataloader_drop_last=True,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=0.0,  # no clipping: Adam's steps do not depend on the gradient's length
        seed=settings.seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]


def _alphabet(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """The commonest characters; ties are broken by code point, which the trainer's own choice leaves to chance."""
    counts = Counter(character for text in texts for character in tokenizer.normalizer.normalize_str(text))
    counts.update(dict.fromkeys(_WORD_START, len(texts)))
    kept = sorted(counts, key=lambda character: (-counts[character], character))
    return [character for character in kept if not character.isspace()][:_ALPHABET_SIZE]


def _silent_tokens(tokenizer: Tokenizer) -> list[int]:
    """Ids of tokens that say nothing of a text's subject: punctuation, and the unknown."""
    return [
        index
        for token, index in tokenizer.get_vocab().items()
        if token == UNKNOWN or not any(character.isalnum() for character in token)
    ]


def _cooccurrences(documents: Sequence[np.ndarray], *, vocab_size: int, window: int) -> "csr_matrix":
    """Symmetric sparse [vocab, vocab]: how often two tokens stand within `window`, near ones counting more."""
    from scipy.sparse import csr_matrix

    # `window` gaps between documents, so that no pair reaches across
    gap = np.full(window, -1, dtype=np.int32)
    stream = np.concatenate([part for document in documents for part in (document, gap)])
    counts = csr_matrix((vocab_size, vocab_size), dtype=np.float64)
    for distance in range(1, window + 1):
        first, second = stream[:-distance], stream[distance:]
        inside = (first >= 0) & (second >= 0)
        weights = np.full(inside.sum(), (window + 1 - distance) / window)
        counts = counts + csr_matrix((weights, (first[inside], second[inside])), shape=counts.shape)
    return counts + counts.T


def _ppmi(counts: "csr_matrix") -> "csr_matrix":
    """Positive PMI; contexts are smoothed by the power 0.75, which keeps rare ones from dominating."""
    cells = counts.tocoo()
    rows = np.asarray(counts.sum(axis=1)).ravel()
    contexts = rows**0.75
    contexts *= rows.sum() / contexts.sum()
    pmi = np.log(cells.data * rows.sum() / (rows[cells.row] * contexts[cells.col]))
    cells.data = np.maximum(pmi, 0)
    positive = cells.tocsr()
    positive.eliminate_zeros()
    return positive


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
