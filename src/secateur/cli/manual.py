"""Texts of ``--help``: methods and examples. Importing them needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.errors import UserError
from secateur.methods.registry import METHODS, plugin_methods

__all__ = [
    "COMPARE_EPILOG",
    "COMPLETION_EPILOG",
    "DATA_EPILOG",
    "DOCUMENTS",
    "EPILOG",
    "EVAL_EPILOG",
    "MASK_EPILOG",
    "RECOMMEND_EPILOG",
    "SEARCH_EPILOG",
    "SHAPES_EPILOG",
    "SOURCES",
    "STUDY_EPILOGS",
    "TEACH_EPILOG",
    "TRAIN_EPILOG",
    "memory_hint",
    "prune_epilog",
]

#: verb -> options that need less memory when lowered, and options that need less memory when set
_MEMORY = {
    "prune": (("--batch", "--windows"), ("--states disk", "--dtype bfloat16")),
    "teach": (("--batch",), ("--dtype bfloat16",)),
    "train": (("--micro-batch",), ("--recompute", "--dtype bfloat16")),
}


def memory_hint(arguments: Sequence[str]) -> str:
    """Suggest options that need less memory, leaving out those that ``arguments`` already have."""
    line = f"{' '.join(arguments)} ".replace("=", " ")
    lower, take = _MEMORY.get(arguments[0] if arguments else "", (("--batch", "--windows"), ()))
    lower = [option for option in lower if f"{option} 1 " not in line]
    if " tokens:" in line:  # all its windows are used
        lower = [option for option in lower if option != "--windows"]
    more = [option for option in take if option not in line]
    offers = [f"{verb} {' or '.join(options)}" for verb, options in (("lower", lower), ("take", more)) if options]
    return ", or ".join(offers) or "take a machine with more"


EPILOG = """\
examples:
  secateur demo                                  the whole comparison in minutes, on any machine
  secateur inspect DIR                           shape, parameters, sparsity, FLOPs, provenance
  secateur shapes DIR --ratio 0.5                its size at half, from config.json alone
  secateur data text:FOLDER OUT --tokenizer DIR  documents as token shards, to train on
  secateur prune DIR OUT --method minitron-width --ratio 0.5 --calibration text:FILE
  secateur search DIR OUT --params 4B --budget 1B --data shards:DIR --calibration text:FILE
  secateur train OUT --init DIR --tokens 1B --data shards:DIR     retrain it, or train from scratch
  secateur teach DIR CORPUS OUT --tokens 1B      a teacher's log-probabilities, to distil without it
  secateur mask MERGED --plan PRUNED             set the zeros of a sparse model again, after a LoRA merge
  secateur eval OUT --data text:FILE             held-out loss and perplexity
  secateur eval A B --suite zero-shot --out DIR  accuracy on the eight tasks of the study, side by side
  secateur compare DIR/A.json DIR/B.json         which of them is better
  secateur study plan demo                       what a study will run, with tokens and FLOPs
  secateur recommend --params 8B --ratio 0.5 --tokens 50B         which path pays, and how sure that is
  eval "$(secateur completion bash)"             completes verbs and options in this shell

`secateur VERB --help` explains a verb. Exit codes: 0 done, 1 a stage or run failed, 2 bad input, 75 stopped
and saved, by Ctrl-C or a signal (the same command resumes), 130 interrupted.
"""

SOURCES = (
    "stdlib, python, text:PATH (file or folder of .txt, .jsonl, .json, .csv, .parquet), hf:NAME[:config], "
    "or tokens:FILE.npy (ids [windows, tokens], used as they are)"
)

DOCUMENTS = (
    "stdlib, python, text:PATH (file or folder of .txt, .jsonl, .json, .csv, .parquet), hf:NAME[:config], or of ids: "
    "arrow:PATH[:column] (written by `datasets`), array_record:PATH[:feature]"
)

DATA_EPILOG = """\
examples:
  secateur data text:corpus OUT --tokenizer DIR
  secateur data text:corpus OUT --tokenizer DIR --field content --domain source --workers 16
  secateur data hf:NAME:config OUT --tokenizer DIR --documents 2M --holdout 0.001
  secateur data arrow:DIR:input_ids OUT --tokenizer DIR    rows of ids; the tokenizer gives the vocabulary
  secateur data array_record:DIR OUT --tokenizer DIR       records of ids, if the package array_record is installed

Memory does not grow with the corpus. While it works it takes about twice the disk that the ids will, in OUT and
OUT.partial. docs/data.md explains the order of documents and the content of OUT.
"""

_HEADINGS = {
    "depth": "depth: removes whole layers; --ratio or --shape layers=N",
    "width": "width: removes channels of every layer; --ratio or --shape hidden=N,ffn=N,heads=N,kv_heads=N",
    "depth+width": "depth+width: removes layers and channels; --ratio or --shape layers=N,hidden=N,ffn=N,heads=N",
    "sparse": "sparse: sets single weights to zero; --ratio or --pattern N:M",
    "experts": "experts: removes routed experts of a mixture; --ratio (a share of them) or --shape experts=N",
}


def _method_lines() -> list[str]:
    """The methods by granularity, with their options."""
    width = max(map(len, METHODS))
    lines = []
    for granularity, heading in _HEADINGS.items():
        lines.append(f"  {heading}")
        for name, method in METHODS.items():
            if method.granularity == granularity:
                lines.append(f"    {name:{width}}  {method.summary}")
                wide = max((len(option.usage) for option in method.options), default=0)
                lines += [f"    {'':{width}}  --option {o.usage:{wide}}  {o.meaning}" for o in method.options]
    return lines


def _plugin_lines() -> list[str]:
    """The methods of installed packages. None is loaded, so a broken package does not break the help."""
    try:
        lines = [f"    {name}  ({entry.value.strip()})" for name, entry in plugin_methods().items()]
    except UserError as error:
        lines = [f"    {error}"]
    return ["", "  of installed packages", *lines] if lines else []


def prune_epilog() -> str:
    """List the methods, built-in and of installed packages, and examples."""
    lines = "\n".join([*_method_lines(), *_plugin_lines()])
    return f"""\
methods by granularity (packages may add more):
{lines}

magnitude and the random controls read no calibration text. Several ratios take about as long as one, except with wanda,
sparsegpt, wanda-sp, minitron-depth and sheared: their scores depend on the ratio, so each ratio takes a run of its own.

sheared trains the whole model for steps * windows * seqlen tokens, and can read them from shards:DIR. It stops with
exit code 1 if its gates do not reach the shape.

examples:
  secateur prune DIR OUT --method minitron-width --ratio 0.5 --calibration text:FILE
  secateur prune DIR OUT --method minitron-width --shape hidden=3072,ffn=9216 --calibration text:FILE
  secateur prune DIR OUT --method minitron-width --params 4B --axes hidden,ffn,kv --calibration text:FILE
  secateur prune DIR OUT --method minitron-width --memory 8GiB --context 8192 --weights int4 --calibration text:FILE
  secateur prune DIR OUT --method minitron-width --latency 0.7x --latency-of prefill --calibration text:FILE
  secateur prune DIR OUT --method minitron-depth --ratio 0.25 --option task=winogrande --tasks-data DIR
  secateur prune DIR OUT --method flap --ratio 0.2 --axes ffn --allocation global --calibration stdlib
  secateur prune DIR OUT --method wanda --pattern 2:4 --calibration tokens:ids.npy
  secateur prune DIR OUT --method minitron-width --ratio 0.5,0.6,0.7 --calibration text:FILE    three outputs
  secateur prune DIR OUT --method sparsegpt --ratio 0.5 --calibration text:FILE --states disk --resume
  secateur prune DIR OUT --method magnitude --ratio 0.5
  secateur prune DIR OUT --method wanda --pattern 2:4 --calibration text:FILE --reconstruct 100    tunes what stays
  secateur prune DIR OUT --method wanda --ratio 0.7 --calibration text:FILE --iterations 4 --reconstruct 200
  secateur prune DIR OUT --method sheared --shape layers=24,hidden=2048,ffn=5504 --calibration shards:DIR
  secateur prune DIR OUT --method sheared --ratio 0.5 --axes layers,hidden,ffn,kv --calibration text:FILE
  torchrun --nproc-per-node 8 -m secateur prune DIR OUT --method wanda --ratio 0.5 --calibration text:FILE

Under torchrun the processes, each on a GPU of its own, share the calibration windows; the result is the same up to
rounding. The first one decides and writes: OUT must lie where all can read it. Resume with as many processes.
"""


SHAPES_EPILOG = """\
examples:
  secateur shapes config.json                              parameters, FLOPs, KV cache
  secateur shapes DIR --ratio 0.5                          fewer layers, narrower, or fewer heads: side by side
  secateur shapes DIR --ratio 0.5 --of total --axes kv,ffn
  secateur shapes DIR --shape layers=16,ffn=9216           any shape, before any method is chosen
  secateur shapes DIR --params 4B                          the same for a number of parameters
  secateur shapes DIR --memory 8GiB --context 8192 --weights int4 --method minitron-width
"""


#: action of ``study`` -> examples
STUDY_EPILOGS = {
    "plan": """\
examples:
  secateur study plan FILE                                                  stages, tokens, FLOPs
  secateur study plan FILE --cluster 64xH100 --mfu 0.4                      wall time and device-hours on a cluster
  secateur study plan FILE --power --pilot runs/mine                        seeds that tell the question's margin
  secateur study plan FILE --power 0.9 --seed-sd 0.007 --document-sd 0.05   the same, from figures of your own
""",
    "run": """\
examples:
  secateur study run FILE --dry-run               what would run, and why
  secateur study run FILE --only 'wanda-*/P-R'    some stages and their inputs
  secateur study run FILE --jobs 4 --keep-going   four at a time; a failure stops only the stages that depend on it
  secateur study run FILE --launcher slurm --slurm partition=gpu --slurm time=240 --slurm mem=64G

keys of --slurm, with their defaults:
  partition=  account=  qos=  constraint=  mem=    as sbatch takes them      time=60    minutes of a job; a longer
  cpus=1    for each process                                                 stage is queued again and resumes
  gpus=     of a node (default: one for each process on it, with --device cuda)
  nodes=1   that share a stage of several processes    array=256  jobs at once    grace=90  seconds to save in

Several processes may run one study at once, on several hosts if they share the disk: no stage is done twice. A host
that is silent for two minutes counts as dead. Finished stages are checked against their hashes, and damaged ones are
rebuilt. The output of each stage is in OUT/logs. Exit code 1 if a stage failed.
""",
    "status": """\
examples:
  secateur study status FILE            once
  secateur study status FILE --watch    a live table; Ctrl-C closes it and leaves the study running
""",
    "explain": """\
examples:
  secateur study explain FILE wanda-0.5/P-R           all stages of that name
  secateur study explain FILE 'train wanda-0.5/P-R'   one of them
""",
}

MASK_EPILOG = """\
examples:
  secateur prune DIR PRUNED --method wanda --ratio 0.5 --calibration text:FILE
  (train a LoRA adapter on PRUNED with PEFT or TRL, then model.merge_and_unload().save_pretrained("MERGED"))
  secateur mask MERGED --plan PRUNED                 writes MERGED-masked
  secateur mask MERGED --plan PRUNED --out OUT

The norm that it prints is that of the weights it set to zero, as a share of the norm of all weights with a mask: how
much of the model the masks take away. Measure the loss afterwards (secateur eval).

A trainer that changes all weights keeps the zeros while it trains with the callback secateur.KeepMasks("PRUNED");
`secateur train` keeps them by itself. docs/next-steps.md has both, with Trainer, TRL, PEFT and Axolotl.
"""

SEARCH_EPILOG = """\
examples:
  secateur search DIR OUT --params 4B --budget 1B --data shards:CORPUS --calibration text:FILE
  secateur search DIR OUT --params 4B --axes hidden,ffn,kv --candidates 8 --budget 1B --data shards:CORPUS \\
      --calibration text:FILE --set tokens_per_step=262144
  secateur search DIR OUT --memory 8GiB --context 8192 --weights int4 --budget 1B --data shards:CORPUS \\
      --calibration text:FILE --teacher DIR

With 12 candidates and 3 finalists the rungs train 12, 6 and 3 models on T, 2T and 4T tokens, T = budget / 36: each rung
has a third of the budget. Shapes that cost more FLOPs a token get fewer tokens, so that all of a rung have equal FLOPs.
The winner of the rungs is chosen on the held-out text; measure it on another (secateur eval OUT/1).
"""

TEACH_EPILOG = """\
examples:
  secateur teach PARENT CORPUS LOGITS --tokens 1B --skip 200M --sequence 8192
  secateur train OUT --init PRUNED --teacher logits:LOGITS --tokens 1B --skip 200M --data shards:CORPUS
  secateur teach PARENT CORPUS LOGITS --top-k 32 --temperature 2 --sequence 2048
  torchrun --nproc-per-node 8 -m secateur teach PARENT CORPUS LOGITS --tokens 1B --dtype bfloat16 --replicas 8

A distribution depends on the window that the teacher reads. Training must have the same --sequence and attention, and
begin at one of the windows; it may read them in any order (data_seed) and stop earlier. It is refused otherwise, and so
are other token shards, another vocabulary or temperature, and a --top-k above the one that was saved.

The size is printed before anything is computed: for N ids about 4 N + 6 bytes a token, or 6 N + 6 where the vocabulary
has more than 65,536 ids. Files have hashes, which training checks before its first step.
"""

TRAIN_EPILOG = """\
keys of the recipe (--recipe FILE, --set KEY=VALUE), with their defaults:
  sequence=8192            tokens in a window           tokens_per_step=4194304  a multiple of sequence
  peak_rate=3e-4           learning rate after warm-up  warmup=0.05              share of the steps
  schedule=cosine|wsd      to final_share at the end    final_share=0.1          of the peak
  decay_share=0.2          share of the steps, wsd      warmup_from=step|zero    rate of the first step
  weight_decay=0.1         of AdamW                     decay=matrices|all       what has weight decay
  beta1=0.9 beta2=0.95 epsilon=1e-8                     clip=1.0                 largest norm of the gradient
  init=truncated-normal|fan-in, or {kind: ..., std: 0.02}    distribution of fresh weights
  mask=before-clip|after-clip  when gradients of sparse models are masked
  seed=0                   of fresh weights             data_seed=0              order of the windows
  attention=window|document    how far attention reaches back: over the whole window, or within the document

examples:
  secateur data text:FOLDER CORPUS --tokenizer DIR
  secateur train OUT --init PRUNED --tokens 50M --data shards:CORPUS --skip 200M --set tokens_per_step=262144
  secateur train OUT --init PRUNED --tokens 1B --data shards:CORPUS --set peak_rate=1e-4
  secateur train OUT --init scratch --like PRUNED --tokens 1B --data shards:CORPUS    its twin, masks kept
  secateur train OUT --init PRUNED --lora rank=16,alpha=32,targets=all --merge --tokens 1B --data shards:CORPUS
  secateur train OUT --init PRUNED --teacher DIR --alpha 0.5 --tokens 1B --data shards:CORPUS    distil from DIR
  secateur train OUT --init PRUNED --teacher logits:DIR --tokens 1B --data shards:CORPUS   from what a teacher has saved
  torchrun --nproc-per-node 8 -m secateur train OUT --init DIR --tokens 50e9 --data shards:CORPUS --dtype bfloat16

Fewer than 50 optimizer steps are warned of: 50M tokens are 12 steps of the default tokens_per_step, 191 of 262144.

With --teacher, a token's loss is alpha T^2 KL(teacher || student) + (1 - alpha) times the usual loss, both at
temperature T within the KL; held-out losses are the usual loss. The teacher's forward passes count as FLOPs, unless
`secateur teach` has made them before.

--lora trains a low-rank adapter and freezes the weights. Keys: rank=16, alpha (default: twice the rank), targets=all,
attention, ffn or names of linears joined by + (q_proj+v_proj), peak_rate (default: the recipe's), base=4bit (QLoRA:
frozen weights in 4 bits; needs bitsandbytes). Of a sparse model the update is masked in each forward pass, so zeros
stay. Without --merge, OUT is the adapter alone, in PEFT's format.

Zeros are kept by masks alone (plan.safetensors beside DIR). A sparse checkpoint of another tool has none: --keep-zeros
makes them of its zeros. OUT is stored in the types of --init DIR, unless --save-dtype chooses another.

After a kill, the same command resumes from the last checkpoint, on any number of processes. Ctrl-C, SIGTERM and SIGUSR1
make it save and stop with exit code 75; a second Ctrl-C stops at once. OUT holds the checkpoint, train.json
(request, tokens, curve, FLOPs) and metrics.jsonl (a line for each step).
"""


RECOMMEND_EPILOG = """\
Which account decides: an existing parent costs nothing more, so both paths get --tokens (equal training tokens). A
parent that must be trained counts, so training from scratch gets its tokens as well, or its share of them (equal
total tokens). Equal FLOPs are shown beside them: a token of the parent costs more than a token of the small model.

examples:
  secateur recommend --params 8B --ratio 0.5 --tokens 50B
  secateur recommend --params 8B --ratio 0.5 --tokens 50B --granularity width --parent must-train --parent-tokens 200B
  secateur recommend --params 8B --ratio 0.5 --tokens 50B --parent must-train --parent-tokens 200B --children 4
  secateur recommend --params 8B --ratio 0.5 --tokens 100B --cost-per-hour 2.5 --flops-per-second 4e14 --currency EUR
  secateur recommend --model config.json --ratio 0.5 --tokens 20B --method minitron-depth
  secateur recommend --params 8B --ratio 0.5 --tokens 50B --pilot pilot.yaml
  secateur recommend --params 8B --ratio 0.5 --tokens 50B --study runs/mine
  secateur recommend --params 2M --ratio 0.5 --tokens 1M --study runs/mine --like mine.yaml --pilot next.yaml

The published curves are those of arXiv:2606.14150, for one parent of 8 B parameters and 26 tokens a parameter at ratio
0.5. Where a question is far from them, published findings answer, or the reason why they cannot and the cheapest pilot
that would. docs/prediction.md gives the rules, questions with their answers, and the errors of such fits.
"""


EVAL_EPILOG = """\
suites, joined by commas:
  perplexity   C4, WikiText and CNN/DailyMail: 256 windows of 8192 tokens at most
  zero-shot    winogrande, arc_challenge, arc_easy, hellaswag, piqa, sciq, boolq, openbookqa
  paper        both of these, and the held-out loss on --data
  cost         parameters, bytes, KV cache, tokens a second, time to first token, memory, on this device
  any other name is a task, group or tag of lm-eval (gsm8k, mmlu, ai2_arc), or a pattern (arithmetic_*)

Tasks go through lm-evaluation-harness (the extra tasks), with the task's own number of examples in
the prompt (mostly none) or --few-shot N. A request longer than the model's positions loses its beginning, as in the
harness, and a notice says so. --protocol heldout reads held-out splits; paper-train-split reads the train splits of the
published study, which overlap with its calibration text.

local data, in place of the Hugging Face Hub:
  --tasks-data DIR   DIR/<task>.jsonl, one document a line in the fields of the task's dataset on the Hub; examples in
                     the prompt are drawn from DIR/<task>.examples.jsonl
  --text-data DIR    DIR/c4.*, DIR/wikitext.* and DIR/cnn_dailymail.* (.txt, .jsonl, .json, .csv, .parquet or a folder
                     of them; text in the field text, of cnn_dailymail in article); c4-train.* ... for paper-train-split

examples:
  secateur eval DIR --data shards:CORPUS                         loss, by domain and by position
  secateur eval DIR --suite paper --data shards:CORPUS --out results
  secateur eval DIR --suite zero-shot --tasks-data tasks --task-limit 200
  secateur eval DIR --suite mmlu,gsm8k --few-shot 5
  secateur eval PRUNED SCRATCH --suite perplexity,arc_easy --text-data texts --tasks-data tasks --out results
  secateur eval PARENT PRUNED --suite cost --device cuda
  secateur eval PRUNED SCRATCH --data shards:CORPUS --weights int4   as served with 4 bits a weight
  torchrun --nproc-per-node 8 -m secateur eval DIR --suite paper --data shards:CORPUS

With --out, DIR/<model>.json has all figures and DIR/<model>.jsonl.gz every item; after a kill, the same command
measures only what is missing. See docs/evaluation.md.
"""


COMPLETION_EPILOG = """\
examples, each for the shells that start afterwards:
  secateur completion bash > ~/.local/share/bash-completion/completions/secateur
  secateur completion zsh > ~/.zfunc/_secateur        with fpath+=~/.zfunc before compinit in ~/.zshrc
  secateur completion fish > ~/.config/fish/completions/secateur.fish

In bash this shell alone: eval "$(secateur completion bash)"
"""


COMPARE_EPILOG = """\
For each figure: the difference in A's favour, paired by document or item, its 95% interval and p by Student's t, and
the number of items on which either model is better. With several seeds on both sides, in pairs, the interval covers
seeds as well. A or B is better if the interval excludes zero; losses are equal if it lies within --margin; else it is
undecided, as with fewer than 20 documents. Figures that were measured in different ways are refused.

examples:
  secateur eval PRUNED SCRATCH --suite paper --data shards:CORPUS --out results
  secateur compare results/PRUNED.json results/SCRATCH.json
  secateur compare p0.json,p1.json,p2.json s0.json,s1.json,s2.json      three seeds each
"""
