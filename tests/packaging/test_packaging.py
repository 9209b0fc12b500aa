"""What a person gets who installs the project: every file, under the names the code uses, with its types."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from support import REPOSITORY

pytestmark = pytest.mark.slow

FOLDERS = ("ir", "passes", "pipelines", "tools")
SHIPPED = (".py", ".yaml", ".onnx", ".npz", ".typed", ".j2", ".css", ".json")
PACKAGES = [part for folder in FOLDERS for part in ("-p", f"qat2int8.{folder}")]


def call(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)


def succeed(*command: str | Path, cwd: Path) -> str:
    done = call(*command, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked() -> list[str]:
    names = succeed("git", "ls-files", "-z", cwd=REPOSITORY).split("\0")
    return [name for name in names if name and (REPOSITORY / name).exists()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files, so that builds leave nothing behind in the repository."""
    root = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, root / name, follow_symlinks=False)
    return root


@pytest.fixture(scope="module")
def dist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    succeed(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of a fresh environment with the wheel in it; dependencies are borrowed from this one."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root)
    python = root / "bin" / "python"
    succeed(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"),
        *dist.glob("*.whl"),
        cwd=root,
    )
    packages = Path(
        succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=root).strip()
    )
    (packages / "borrowed.pth").write_text("\n".join([sysconfig.get_path("purelib"), *site.getsitepackages()]))
    return root / "bin"


def test_links_resolve_to_the_folders_beside() -> None:
    for folder in FOLDERS:
        link = REPOSITORY / "qat2int8" / folder
        assert link.is_symlink()
        assert link.readlink() == Path("..") / folder
        assert (link / "__init__.py").exists()


def test_the_wheel_has_every_tracked_file_and_no_other(dist: Path) -> None:
    expected = {"qat2int8/tools/demo_data/README.md"}
    for name in tracked():
        top = name.split("/")[0]
        if Path(name).suffix in SHIPPED and not (REPOSITORY / name).is_symlink():
            expected |= {f"qat2int8/{name}"} if top in FOLDERS else {name} if top == "qat2int8" else set()
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert "qat2int8/py.typed" in names


def test_the_sdist_has_files_not_links(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    assert {"ir/__init__.py", "passes/__init__.py", "pipelines/__init__.py", "LICENSE"} <= set(members)


def test_an_installed_wheel_imports_under_its_own_name_only(installed: Path, tmp_path: Path) -> None:
    script = (
        "import sys, importlib.resources as r, qat2int8, qat2int8.tools.cli\n"
        "from qat2int8.passes.registry import all_passes\n"
        "assert all_passes()\n"
        f"assert qat2int8.__file__.startswith({str(installed.parent)!r}), qat2int8.__file__\n"
        "assert not {'ir', 'passes', 'pipelines', 'tools'} & set(sys.modules)\n"
        "assert r.files('qat2int8.pipelines').joinpath('targets', 'ort-x86.yaml').read_text()\n"
        "data = r.files('qat2int8.tools.demo_data')\n"
        "for name in ('resnet_trt_qat.onnx', 'resnet_trt_fp32.onnx', 'mnist500.npz', 'README.md'):\n"
        "    assert data.joinpath(name).read_bytes()\n"
    )
    succeed(installed / "python", "-c", script, cwd=tmp_path)


def test_the_console_script_answers(installed: Path, tmp_path: Path) -> None:
    assert "convert" in succeed(installed / "qat2int8", "--help", cwd=tmp_path)


def test_a_consumer_sees_the_types(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text("from qat2int8.ir import Interval\nplanted: int = Interval(0.0, 1.0)\n")
    mypy = (sys.executable, "-m", "mypy", "--python-executable", installed / "python", "consumer.py")
    done = call(*mypy, cwd=tmp_path)
    assert 'has type "Interval"' in done.stdout
    assert done.stdout.count("error:") == 1


def test_mypy_finds_a_type_error_planted_across_packages(checkout: Path, tmp_path: Path) -> None:
    root = tmp_path / "planted"
    shutil.copytree(checkout, root, symlinks=True)
    with (root / "passes" / "registry.py").open("a") as file:
        file.write("\nfrom qat2int8.ir import Interval as _Interval\n_planted: int = _Interval(0.0, 1.0)\n")
    done = call(sys.executable, "-m", "mypy", *PACKAGES, cwd=root)
    assert 'has type "Interval"' in done.stdout
    assert "registry.py" in done.stdout
