"""The commands of an installation: each runs the script of that name, which in a checkout lies at its root.

w2v2-pretrain CONFIG.yaml --flag value …
accelerate launch -m w2v2 pretrain CONFIG.yaml --flag value …        (what a launcher starts is a module)
"""

import sys
from importlib import import_module
from pathlib import Path

import w2v2
from w2v2.errors import did_you_mean

SCRIPTS = "pretrain finetune_ctc finetune_classification probe verify_speakers report convert_checkpoint".split()
DATA_SCRIPTS = (
    "make_demo_corpus prepare_folder prepare_librispeech prepare_libri_light prepare_common_voice prepare_voxpopuli "
    "prepare_labelled prepare_iemocap prepare_voxceleb measure_audio segment pack_audio describe_data build_ngram cluster"
).split()
USAGE = f"""python -m w2v2 SCRIPT … or w2v2-SCRIPT …, with --help for its flags
scripts: {", ".join(SCRIPTS)}
for data: {", ".join(DATA_SCRIPTS)}
configurations: {w2v2.ROOT / "configs"}"""


def main() -> None:
    """Run what the command's name says, or else the first argument."""
    command = Path(sys.argv[0]).stem
    if not command.startswith("w2v2-"):
        command = f"w2v2-{''.join(sys.argv[1:2])}".replace("_", "-")
        sys.argv[:2] = [command]  # it stands in usage and errors
    name = command.removeprefix("w2v2-").replace("-", "_")
    if name in ("__help", "_h"):
        return print(USAGE)
    if name not in SCRIPTS + DATA_SCRIPTS:
        hint = did_you_mean(name, SCRIPTS + DATA_SCRIPTS, "see the list above")
        print(USAGE + (f"\nerror: no script {name!r}: {hint}" if name else ""), file=sys.stderr)
        sys.exit(2)
    sys.path.insert(
        0, str(w2v2.ROOT if name in SCRIPTS else w2v2.ROOT / "data_scripts")
    )  # as `python FOLDER/NAME.py` does
    if name in SCRIPTS:
        from w2v2.cli import run_script  # slow to import

        run_script(import_module(name).main)
    else:
        sys.exit(import_module(name).main())


if __name__ == "__main__":
    main()
