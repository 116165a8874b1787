"""`crdnd doctor`."""

import platform
import shutil
import sys
from typing import Any

import typer

from crdnd.cli._common import JsonOption, print_json
from crdnd.machine import cores
from crdnd.provenance import installed_version

# distribution -> what it is for; the command that mends a gap installs the distribution
REQUIRED = {
    "torch": "training and evaluation",
    "accelerate": "devices and processes",
    "numpy": "data",
    "safetensors": "weights",
    "scikit-learn": "the digits",
    "scipy": "statistics and SVHN's files",
    "pydantic": "settings",
    "plotly": "reports",
    "jinja2": "reports",
    "pillow": "reports and images",
    "filelock": "run folders",
    "huggingface_hub": "models of the hub",
}
OPTIONAL = {
    "tensorboard": "trackers: [tensorboard]",
    "datasets": "--data hf:OWNER/NAME",
    "onnx": "crdnd export: [export]",
    "onnxscript": "crdnd export: [export]",
    "onnxruntime": "crdnd export: [export]",
}


def doctor_command(json: JsonOption = False) -> None:
    """Show versions, devices and threads, what is missing, and the command that mends it.

    Examples:

        crdnd doctor

        crdnd doctor --json
    """
    report = examine()
    if json:
        print_json(report)
    else:
        for key, value in report.items():
            if isinstance(value, dict):
                print(f"{key}:")
                for name, detail in value.items():
                    print(f"  {name}: {detail}")
            elif key != "problems":
                print(f"{key}: {value}")
        for problem in report["problems"]:
            print(f"problem: {problem['what']}. Mend it with: {problem['fix']}")
        if not report["problems"]:
            print("everything needed is here.")
    if report["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """What this machine has, and what it lacks."""
    problems: list[dict[str, str]] = []
    packages: dict[str, str] = {}
    for name, purpose in REQUIRED.items():
        found = installed_version(name)
        packages[name] = found or "missing"
        if found is None:
            problems.append(
                {"what": f"{name} is missing ({purpose})", "fix": f"{sys.executable} -m pip install {name}"}
            )
    for name, purpose in OPTIONAL.items():
        packages[name] = installed_version(name) or f"not installed (optional, for {purpose}): pip install {name}"
    return {
        "crdnd": installed_version("crdnd"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": _devices(problems) if installed_version("torch") else {},
        "cores": cores(),
        "free_disk_gb": round(shutil.disk_usage(".").free / 1e9, 1),
        "problems": problems,
    }


def _devices(problems: list[dict[str, str]]) -> dict[str, str]:
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(
            {
                "what": f"torch does not import ({str(error).splitlines()[0]})",
                "fix": f"{sys.executable} -m pip install --force-reinstall torch",
            }
        )
        return {}
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "not used, because it has no float64"
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        if torch.version.cuda is None:
            what, fix = "this torch has no CUDA", f"{sys.executable} -m pip install --force-reinstall torch"
        else:
            what = f"this torch, for CUDA {torch.version.cuda}, finds no GPU"
            fix = "unset CUDA_VISIBLE_DEVICES, or update the driver"
        problems.append({"what": f"there is an NVIDIA driver, but {what}", "fix": fix})
    return devices
