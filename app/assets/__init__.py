"""The models and examples that the package carries, and where a model given by name lies on disk."""

import sysconfig
from pathlib import Path

from app.errors import UserError

ASSETS = Path(__file__).parent
EMBEDDED_BASE = ASSETS / "base"
EMBEDDED_EMBEDDER = ASSETS / "embedder"


def model_folder(name: str, *, embedded: Path | None = EMBEDDED_BASE, setting: str = "model") -> Path:
    """The folder of model `name`: `embedded`, a path, or a Hugging Face name, fetched if it is not in the hub cache.

    `setting` is what the user calls it. With `embedded=None` there is none of that kind in the package.

    Raises:
        UserError: the name is neither a folder here nor to be had from the hub.
    """
    if name == "embedded" and embedded is not None:
        return embedded
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{setting}={name!r}: no such folder")
    return _from_hub(name, setting=setting, remedy="a local folder" + (", or `embedded`" if embedded else ""))


def carried_file(path: str) -> str:
    """`path`; where there is none, the one of that name in the project's checkout or in what pip installed with us."""
    carried = (ASSETS.parents[1], Path(sysconfig.get_path("data"), "share/pacos"))
    return next((str(file) for root in (Path(), *carried) if (file := root / path).exists()), path)


def _from_hub(name: str, *, setting: str, remedy: str) -> Path:
    from huggingface_hub import snapshot_download

    # Weights as safetensors only: pickled ones can run code when they are loaded.
    wanted = ["*.json", "*.txt", "*.safetensors", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub raises a dozen types, all of them meaning "not to be had"
        raise UserError(
            f"{setting}={name!r}: no such folder, and the Hugging Face hub did not deliver it "
            f"({type(error).__name__}); give {remedy}"
        ) from None
