"""What `pip install` brings: commands that run the scripts, and configurations that they find from any folder."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import write_tones

import w2v2
from w2v2.__main__ import DATA_SCRIPTS, SCRIPTS
from w2v2.arguments import PretrainArguments
from w2v2.cli import parse_command_line
from w2v2.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NOT_COMMANDS = {"demo", "setup"}


def files_of(*patterns):
    """Names of files below the checkout's root that git would keep."""
    found = {path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def programs(pattern):
    return {path.stem for path in ROOT.glob(pattern) if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as a wheel has it, built from its source distribution, unpacked."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("made")
    kept = files_of("*.*", "LICENSE", "w2v2/**/*", "configs/**/*", "data_scripts/**/*")
    for name in kept:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build(source, "sdist", made)
    (archive,) = made.glob("*.tar.gz")
    subprocess.run(["tar", "-xzf", archive, "-C", made], check=True)
    build(made / archive.name.removesuffix(".tar.gz"), "wheel", made)
    (wheel,) = made.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(made / "site")
    return made / "site"


def build(source, kind, folder):
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def call(installed, folder, *arguments, **environment):
    """The installed package, and nothing of the checkout, in another folder."""
    environment = os.environ | {"PYTHONPATH": str(installed)} | environment
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_every_program_has_a_command():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = setup["options.entry_points"]["console_scripts"].split("\n")
    commands = dict(line.split(" = ") for line in lines if line)
    assert set(commands) == {f"w2v2-{name.replace('_', '-')}" for name in SCRIPTS + DATA_SCRIPTS}
    assert set(commands.values()) == {"w2v2.__main__:main"}
    assert (set(SCRIPTS), set(DATA_SCRIPTS)) == (programs("*.py") - NOT_COMMANDS, programs("data_scripts/*.py"))


def test_the_wheel_holds_all_that_the_programs_read(installed):
    found = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    library = files_of("w2v2/**/*")
    shipped = files_of("*.py", "data_scripts/*.py", "configs/**/*") - {f"{name}.py" for name in NOT_COMMANDS}
    assert found - {name for name in found if ".dist-info/" in name} == library | {f"w2v2/shipped/{n}" for n in shipped}
    assert "w2v2/py.typed" in library


def test_the_installed_package_trains_from_another_folder(installed, tmp_path):
    """A bare name finds its recipe, and the recipe its model."""
    write_tones(tmp_path / "audio", [2.0, 2.5, 3.0])
    done = call(installed, tmp_path, "-m", "w2v2", "prepare-folder", "audio", "--output", "train.csv")
    assert done.returncode == 0, done.stderr
    flags = ["--train_data=train.csv", "--validation_data=", "--max_steps=1", "--use_cpu", "--dataloader_num_workers=0"]
    done = call(installed, tmp_path, "-m", "w2v2", "pretrain", "small", *flags, "--output_dir=run")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((tmp_path / "run" / "pretrain_config.yaml").read_text(encoding="utf-8"))
    assert (config["mask_time_length"], config["config_name"]) == (5, "small")


def test_a_command_runs_its_script(installed, tmp_path):
    """As pip writes commands; those of data scripts import their neighbours."""
    command = tmp_path / "w2v2-describe-data"
    command.write_text("import sys\nfrom w2v2.__main__ import main\nsys.exit(main())\n")
    done = call(installed, tmp_path, str(command), "--help")
    assert done.stdout.startswith("usage: w2v2-describe-data "), done.stderr
    done = call(installed, tmp_path, "-m", "w2v2", "pretrian")
    assert done.returncode == 2 and str(installed / "w2v2/shipped/configs") in done.stderr
    assert done.stderr.endswith("no script 'pretrian': did you mean pretrain?\n")


def test_a_path_that_exists_wins(tmp_path, monkeypatch):
    given = ["--train_data=a.csv", "--output_dir=run"]

    def max_steps(*argv):
        return parse_command_line([PretrainArguments], [*argv, *given])[0].max_steps

    monkeypatch.chdir(tmp_path)
    assert max_steps("small") == max_steps("configs/pretrain/small.yaml") == 3000
    Path("small").write_text("max_steps: 7\n")
    assert max_steps("small") == 7 and w2v2.ROOT == ROOT
    with pytest.raises(UserError, match="smal: no such configuration file"):
        max_steps("smal")


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["version"] == w2v2.__version__
    assert {"message", "title", "authors"} <= citation.keys()
