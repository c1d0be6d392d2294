"""Nothing that comes from others is ever executed, nothing secret is ever written down, and nothing outside of the
run's folder is touched.
"""

import ast
import json
import os
import pickle
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from conftest import error_line, refusal, run_here, tiny_config, write_tones
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from ranks import SECONDS, log_of, start_run
from safetensors.torch import load_file
from tiny_run import contents, prepare
from transformers import Wav2Vec2FeatureExtractor

import finetune_ctc
import pretrain
from w2v2.arguments import PretrainArguments
from w2v2.data.utterances import load_manifest
from w2v2.finetune.arguments import FineTuningArguments, prepare_output_dir
from w2v2.hub.card import write_model_card
from w2v2.model.pretraining import PretrainingModel, build_model

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "RecognizableSecret" * 2
LENGTHS = [1.0 + number / 10 for number in range(8)]
SCRIPTS = {"pretrain": pretrain.main, "finetune_ctc": finetune_ctc.main}


class Planted:
    """Unpickled, it creates the file `witness`."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


def plant(path: Path, witness: Path, kind: str = "zip") -> None:
    """A pickle, bare or in the form that `torch.save` writes, that shows when it is loaded."""
    path.write_bytes(pickle.dumps(Planted(witness))) if kind == "bare" else torch.save({"a": Planted(witness)}, path)


def plant_code(folder: Path, witness: Path, **changes) -> None:
    """A module that shows when it is imported, and a configuration with these changes beside it."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(witness)!r}).touch()\n")


@pytest.fixture
def witness(tmp_path):
    """A path at which nothing may appear; the trap is then shown to have been live."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()
    plant(tmp_path / "live.bin", path)
    torch.load(tmp_path / "live.bin", weights_only=False)
    assert path.exists()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eight tones with text, a tiny model's weights, and its bare configuration."""
    folder = tmp_path_factory.mktemp("security")
    paths = write_tones(folder / "audio", LENGTHS)
    rows = [{"audio": str(p), "duration": s, "text": "one two"} for p, s in zip(paths, LENGTHS, strict=True)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    PretrainingModel(tiny_config()).save_pretrained(folder / "model")
    Wav2Vec2FeatureExtractor().save_pretrained(folder / "model")
    shutil.copytree(folder / "model", folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def flags(name, corpus, output_dir, **changes):
    values = dict(train_data=corpus / "train.jsonl", validation_data=corpus / "train.jsonl", output_dir=output_dir)
    values |= dict(model_name_or_path=corpus / "model", dataloader_num_workers=0, report_to="none", max_steps=2)
    values |= dict(eval_steps=2, save_steps=2, logging_steps=1, use_cpu=True)
    if name == "pretrain":
        values |= dict(min_seconds=0.5, batch_hours=0.002, micro_batch_seconds=8)
    else:
        values |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=1, mask_feature_length=8)
    return [f"--{key}={value}" for key, value in (values | changes).items() if value is not None]


@pytest.fixture(params=SCRIPTS)
def refused(request, corpus, tmp_path, capsys):
    """Runs a script, which has to end with status 2 and one line that holds what is named."""

    def check(*named, extra=(), **changes):
        argv = flags(request.param, corpus, changes.pop("output_dir", tmp_path / "run"), **changes)
        return refusal(capsys, SCRIPTS[request.param], *extra, *argv, named=named)

    return check


# Weights, configurations and checkpoints of others.


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
@pytest.mark.parametrize("kind", ["bare", "zip"])
def test_weights_in_a_pickle_are_refused_with_the_way_out(corpus, tmp_path, refused, witness, name, kind):
    folder = shutil.copytree(corpus / "bare", tmp_path / "model")
    plant(folder / name, witness, kind)
    refused(name, "docs/security.md", model_name_or_path=folder)


def test_pickles_and_code_beside_weights_are_left_alone(corpus, tmp_path, witness):
    folder = shutil.copytree(corpus / "model", tmp_path / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        plant(folder / name, witness)
    plant_code(folder, witness, auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForPreTraining": "evil.EvilModel"})
    assert run_here(pretrain.main, *flags("pretrain", corpus, tmp_path / "run", model_name_or_path=folder)) == 0


def test_a_hub_repository_without_safetensors_is_refused(corpus, tmp_path, witness):
    """Nor is anybody else asked to convert it."""
    plant(tmp_path / "pytorch_model.bin", witness)
    with HubStandIn() as hub:
        for path in (*(corpus / "bare").iterdir(), tmp_path / "pytorch_model.bin"):
            hub.files[path.name] = path.read_bytes()
        first, *more = flags("pretrain", corpus, tmp_path / "run", model_name_or_path="speech-lab/old")
        variables = dict(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE=0, HF_HOME=tmp_path / "hf")
        assert start_run(first, tmp_path / "run", *more, **variables).wait(SECONDS) == 2
        line = error_line(log_of(tmp_path / "run"))
        assert "speech-lab/old" in line and "pytorch_model.bin" in line and "docs/security.md" in line
        assert not [path for path in hub.paths if "discussions" in path or path.endswith("pytorch_model.bin")]


def conversion() -> str:
    return re.search(r"```python\n(.*?)```", (ROOT / "docs/security.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def test_the_documented_conversion_keeps_every_weight(corpus, tmp_path, monkeypatch):
    folder = shutil.copytree(corpus / "bare", tmp_path / "model")
    weights = load_file(corpus / "model" / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    monkeypatch.chdir(folder)
    exec(conversion(), {})
    args = PretrainArguments(train_data=["a.csv"], output_dir="run", model_name_or_path=str(folder))
    loaded = build_model(args, tiny_config()).state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[key], weights[key]) for key in weights)


@pytest.mark.parametrize("kind", ["bare", "zip"])
def test_the_documented_conversion_runs_no_planted_code(tmp_path, monkeypatch, witness, kind):
    plant(tmp_path / "pytorch_model.bin", witness, kind)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        exec(conversion(), {})


@pytest.fixture(scope="module")
def fine_tuned(corpus):
    """A finished run of fine-tuning, of two updates."""
    output_dir = corpus / "fine_tuned"
    assert run_here(finetune_ctc.main, *flags("finetune_ctc", corpus, output_dir)) == 0
    return output_dir


@pytest.fixture
def resume(corpus, fine_tuned, tmp_path):
    """Resumes fine-tuning in a copy of that run's folder; returns the status."""
    shutil.copytree(fine_tuned / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    arguments = flags("finetune_ctc", corpus, tmp_path / "run", resume_from_checkpoint="auto", max_steps=4)
    return lambda: run_here(finetune_ctc.main, *arguments)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("kind", ["bare", "zip"])
def test_fine_tuning_resumes_from_no_planted_state(resume, tmp_path, capsys, witness, name, kind):
    for planted in (name, "training_args.bin"):
        plant(tmp_path / "run" / "checkpoint-2" / planted, witness, kind)
    assert resume() == 2
    line = error_line(capsys.readouterr().err)
    assert "checkpoint-2" in line and "training state is not one that Trainer wrote" in line


def test_fine_tuning_resumes_and_leaves_no_pickled_flags(resume, tmp_path):
    assert resume() == 0
    assert (tmp_path / "run" / "checkpoint-4").is_dir() and not list((tmp_path / "run").rglob("training_args.bin"))


MALICIOUS = [
    ({"hidden_size": 10**9}, "hidden_size is 1000000000"),
    ({"hidden_size": 2**60}, "hidden_size"),
    ({"hidden_size": -32}, "hidden_size is -32"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"hidden_size": 33}, "hidden_size 33 cannot be divided"),
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": [32]}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 65_536, "num_hidden_layers": 1_000}, "hidden_size is 65536: the model takes more than"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"conv_dim": []}, "conv_dim"),
    ({"conv_dim": [10**9] * 7}, "conv_dim"),
    ({"conv_dim": "wide"}, "conv_dim"),
    ({"conv_stride": [0] * 7}, "conv_stride"),
    ({"conv_kernel": [10, 3]}, "conv_kernel"),
    ({"num_codevectors_per_group": 10**12}, "num_codevectors_per_group"),
    ({"num_conv_pos_embedding_groups": 7}, "num_conv_pos_embedding_groups"),
    ({"hidden_act": "os.system"}, "os.system"),
    ({"feat_extract_norm": "evil"}, "evil"),
    ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}, "custom code"),
]


@pytest.mark.parametrize(("changes", "named"), MALICIOUS, ids=[str(changes)[:40] for changes, _ in MALICIOUS])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "configuration"])
def test_a_configuration_of_no_model_is_refused(corpus, tmp_path, refused, witness, changes, named, weights):
    folder = shutil.copytree(corpus / "model", tmp_path / "model")
    plant_code(folder, witness, **changes)
    source = dict(model_name_or_path=folder) if weights else dict(model_name_or_path=None, config_name=folder)
    assert named in refused(folder, **source)


@pytest.mark.parametrize("text", ["", "[]", "3", '"x"', "null", "{", "[" * 100_000, '{"model_type": ["wav2vec2"]}'])
def test_a_configuration_that_is_none_is_refused(corpus, tmp_path, refused, text):
    folder = shutil.copytree(corpus / "model", tmp_path / "model")
    (folder / "config.json").write_text(text)
    refused(folder, model_name_or_path=folder)


def test_a_yaml_file_makes_no_objects(tmp_path, refused, witness):
    config = tmp_path / "config.yaml"
    config.write_text(f"seed: !!python/object/apply:os.system ['touch {witness}']\n")
    refused(config, "not valid YAML", extra=(config,))


def test_tables_of_others_make_no_objects(tmp_path, witness):
    """Arrow once had a type that was stored as a pickle."""
    names = (b"ARROW:extension:name", b"ARROW:extension:metadata")
    metadata = dict(zip(names, (b"arrow.py_extension_type", pickle.dumps(Planted(witness))), strict=True))
    fields = [pa.field("audio", pa.string(), metadata=metadata), pa.field("duration", pa.float64())]
    table = pa.table([pa.array(["a.wav"]), pa.array([1.0])], schema=pa.schema(fields))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert load_manifest([str(tmp_path / "a.parquet")])[0]["num_samples"][:] == [16_000]


# The product's own files.


FORBIDDEN_NAMES = set("eval exec compile __import__ breakpoint".split())
FORBIDDEN_MODULES = set("pickle cPickle dill cloudpickle joblib marshal shelve zipfile runpy".split())
FORBIDDEN_ANYWHERE = set(
    "load_dataset load_dataset_builder unpack_archive extract extractall register_for_checkpointing load_state read_pickle unsafe_load "
    "full_load getoutput getstatusoutput popen execv execve execvp spawnl spawnv".split()
)
FORBIDDEN_CALLS = {"os": {"system"}, "yaml": {"load", "load_all"}}  # elsewhere these names may mean something else
SAFE_VALUES = dict(shell=False, allow_pickle=False, trust_remote_code=False)


def dangers(source: str) -> list[str]:
    """What could run somebody else's code, or write where an archive says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            forbidden = FORBIDDEN_ANYWHERE | FORBIDDEN_CALLS.get(module, set())
            names = [alias.name for alias in node.names if alias.name != "UnpicklingError"]  # which is only caught
            found += [name for name in names if module in FORBIDDEN_MODULES or name in forbidden]
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
            if node.attr in FORBIDDEN_ANYWHERE | FORBIDDEN_CALLS.get(owner, set()):
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Call):
            given = {keyword.arg: getattr(keyword.value, "value", "?") for keyword in node.keywords}
            found += [name for name, safe in SAFE_VALUES.items() if given.get(name, safe) is not safe]
            called = ast.unparse(node.func)
            if called == "torch.load" and given.get("weights_only") is not True:
                found.append(called)
            loads_weights = called.endswith("from_pretrained") and ("Model" in called or "model_class." in called)
            if loads_weights and given.get("use_safetensors") is not True:
                found.append(called)
    return found


PRODUCT = sorted(
    path for pattern in ("*.py", "w2v2/**/*.py", "data_scripts/*.py", "benchmarks/*.py") for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("path", PRODUCT, ids=[str(path.relative_to(ROOT)) for path in PRODUCT])
def test_no_file_of_the_product_can_run_what_others_wrote(path):
    known = {  # `datasets` runs no scripts from release 4 on
        "drilled.py": ["runpy"],  # which runs pretrain.py itself
        "dataset_loading.py": ["datasets.load_dataset_builder", "datasets.load_dataset"],
    }
    assert dangers(path.read_text(encoding="utf-8")) == known.get(path.name, [])


DANGEROUS = """import pickle
from pickle import loads
import os.path, zipfile
eval('1')
f = exec
import os; os.system('ls')
from os import system
subprocess.run('ls', shell=True)
subprocess.run('ls', shell=flag)
yaml.load(text)
torch.load(path)
torch.load(path, weights_only=False)
np.load(path, allow_pickle=True)
AutoModel.from_pretrained(path)
AutoConfig.from_pretrained(path, trust_remote_code=True)
datasets.load_dataset('x')
from datasets import load_dataset
shutil.unpack_archive(path)
tarfile.open(path).extractall()
accelerator.load_state(path)"""


@pytest.mark.parametrize("source", DANGEROUS.splitlines())
def test_every_danger_is_seen(source):
    assert dangers(source)


# Tokens, and what a run writes where.


@pytest.fixture(scope="module", params=SCRIPTS)
def pushed(request, corpus, tmp_path_factory):
    """A run in a world of its own, pushed to a stand-in of the Hub with a token that is easy to find again."""
    world = tmp_path_factory.mktemp(f"pushed_{request.param}")
    for name in ("home", "cwd", "temporary"):
        (world / name).mkdir()
    places = dict(HOME="home", HF_HOME="home/hf", TMPDIR="temporary", MPLCONFIGDIR="home")
    variables = {name: str(world / place) for name, place in places.items()}
    variables |= {"HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    more = dict(push_to_hub=True, hub_model_id="speech-lab/tiny", hub_strategy="every_save", report_to="tensorboard")
    more |= dict(dataloader_num_workers=1, log_level="debug")
    arguments = flags(request.param, corpus, world / "out" / "run", **more)
    with HubStandIn() as hub:
        result = subprocess.run(
            [sys.executable, str(ROOT / f"{request.param}.py"), *arguments],
            env=os.environ | variables | {"HF_ENDPOINT": hub.url},
            cwd=world / "cwd",
            capture_output=True,
            text=True,
            timeout=300,
            umask=0o027,
        )
        assert result.returncode == 0, result.stderr[-3_000:]
        assert f"Bearer {TOKEN}" in hub.tokens and hub.files.get("model.safetensors"), hub.paths
        yield world, result, dict(hub.files)


def test_the_token_is_nowhere(pushed):
    world, result, files = pushed
    assert list(world.rglob("events.out.tfevents*"))
    secret = TOKEN.encode()
    everything = {str(path): path.read_bytes() for path in world.rglob("*") if path.is_file()}
    everything |= {f"hub:{name}": content for name, content in files.items()}
    everything |= {"stdout": result.stdout.encode(), "stderr": result.stderr.encode()}
    assert len(everything) > 10
    assert [name for name, content in everything.items() if secret in content or secret[::-1] in content] == []


def test_a_run_writes_into_its_folder_and_caches_alone(pushed):
    world, _, _ = pushed
    outside = {path.relative_to(world).parts for path in world.rglob("*") if path.is_file()}
    assert {parts[0] for parts in outside if parts[:2] != ("out", "run")} <= {"home"}, outside
    assert list((world / "cwd").iterdir()) == list((world / "temporary").iterdir()) == []
    assert {path.name for path in (world / "out").iterdir()} == {"run"}


def test_files_have_the_users_umask(pushed):
    paths = [path for path in (pushed[0] / "out").rglob("*")]
    modes = {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in paths}
    assert modes == {str(path): oct(0o750 if path.is_dir() else 0o640) for path in paths}


@pytest.mark.parametrize("flag", ["hub_model_id", "output_dir", "model_name_or_path"])
def test_a_token_pasted_into_a_flag_is_refused_and_not_repeated(tmp_path, refused, flag):
    line = refused(f"--{flag}", "HF_TOKEN", **{flag: f"speech-lab/{TOKEN}"})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"hub_model_id": TOKEN}))
    assert TOKEN not in line + refused("--hub_model_id", "HF_TOKEN", extra=(config,))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_an_error_names_urls_without_their_secrets(corpus, tmp_path, capsys, streaming):
    url = "http://me:s3cret@127.0.0.1:1/{0..1}.tar?sign=s3cret"
    argv = flags("pretrain", corpus, tmp_path / "run", train_data=url, streaming=streaming)
    line = refusal(capsys, pretrain.main, *argv, named=("/127.0.0.1:1/", ".tar?… "))
    assert "s3cret" not in line


def test_fine_tuning_takes_no_token_as_a_flag(corpus, tmp_path, capsys):
    argv = flags("finetune_ctc", corpus, tmp_path / "run", hub_token="of another form")
    assert "of another form" not in refusal(capsys, finetune_ctc.main, *argv, named=("--hub_token", "HF_TOKEN"))


# Deleting.


@pytest.fixture
def precious(tmp_path):
    """A folder outside of the run's, and links to it in all places where a run deletes."""
    folder = tmp_path / "precious"
    (folder / "training_state").mkdir(parents=True)
    for name in ("thesis.txt", "config.json", "model.safetensors", "trainer_state.json", "optimizer.pt"):
        (folder / name).write_text("years of work")
    run = tmp_path / "run"
    (run / "checkpoint-3").mkdir(parents=True)
    for place in ("checkpoint-1", "checkpoint-3/inside", "plots", "runs", ".unfinished-checkpoint-9"):
        (run / place).symlink_to(folder, target_is_directory=True)
    (run / "metrics.jsonl").symlink_to(folder / "thesis.txt")
    before = contents(folder)
    yield run
    assert contents(folder) == before
    assert not any((run / place).exists() for place in ("checkpoint-1", "checkpoint-3", "runs", "metrics.jsonl"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_overwriting_a_run_follows_no_links(precious, corpus, name):
    if name == "pretrain":
        assert prepare(precious, overwrite=True) is None
    else:
        flags = dict(train_data=["a"], validation_data=["a"], config_name=str(corpus / "bare"), report_to="none")
        args = FineTuningArguments(output_dir=str(precious), overwrite_output_dir=True, use_cpu=True, **flags)
        assert prepare_output_dir(args) is None


# The model card.


def card_of(tmp_path, name="run", **config):
    folder = tmp_path / name
    folder.mkdir()
    write_model_card(folder, config=config, summary={}, metrics=[])
    return ModelCard.load(folder / "README.md")


LICENCES = [
    "mit\n---\n# evil",
    "mit\ntags: [evil]",
    "[evil]",
    "{a: b}",
    "!!python/name:os.system",
    "&a *a",
    "'\"",
    "yes",
]


@pytest.mark.parametrize("licence", LICENCES)
def test_what_the_user_writes_is_a_string_in_the_card(tmp_path, licence):
    card = card_of(tmp_path, hub_license=licence)
    assert card.data.license == licence and card.data.tags == ["wav2vec2", "pretraining"]
    assert card.text.lstrip().startswith("# run")


@pytest.mark.parametrize(
    "name", ['x"); open("y", "w"); print("', "x; touch y", "$(touch y)", "a\\", "x\n# evil\n```", "'"]
)
def test_a_folders_name_is_no_code_in_the_card(tmp_path, name):
    card = card_of(tmp_path, name)
    body = ast.parse(re.search(r"```python\n(.*?)\n```", card.text, re.DOTALL)[1]).body
    shown = name.replace("\n", "\\n")
    assert [ast.unparse(node) for node in body if isinstance(node, ast.Assign)][0] == f"source = {shown!r}"
    command = shlex.split(re.search(r"```bash\n(.*?)\n```", card.text, re.DOTALL)[1])
    assert command[command.index("--model_name_or_path") + 1] == shown
    assert len(command) == 10 and "\n# evil" not in card.text


def test_a_data_set_of_any_name_stays_one_cell(tmp_path):
    card = card_of(tmp_path, train_data=["lists/a`b|c\nd.csv"])
    [row] = [line for line in card.text.splitlines() if line.startswith("| Training | `")]
    assert row == "| Training | `lists/a'b\\|c\\nd.csv` |"
