"""What the user wrote about a search: one YAML for the whole way from raw text to a trained model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_lite.config import Config, ReweightingConfig, load_config
from megatron_lite.schema import nearest

Control = Literal["optimal", "prior", "uniform", "best_single"]


@dataclass(frozen=True)
class CorpusConfig:
    """Where the text comes from; not read when shards.data_dir is set."""

    kind: Literal["local", "none"] = "local"  # local: text of the installed Python packages | none: yours, in `dir`
    dir: str | None = None  # kind none: folder of your train_<domain>.jsonl and valid_<domain>.jsonl
    dists: tuple[str, ...] = ()  # local: Python distributions to read; empty: the built-in allow-list
    max_tokens_per_domain: int = 8_000_000  # local: stop collecting a domain here (estimated tokens)
    workers: int = 0  # local: processes; 0: one a core


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer trained on the corpus; not read when shards.data_dir is set."""

    type: Literal["hf", "sentencepiece"] = "hf"  # Hugging Face byte-level BPE | SentencePiece BPE
    vocab_size: int = 2048  # token ids, special tokens included


@dataclass(frozen=True)
class ShardsConfig:
    """Tokenized shards, made from the corpus or brought along."""

    data_dir: str | None = None  # folder of your own train_*/valid_* shards: skips corpus, tokenizer and shards
    fraction: float = 1.0  # share of the training documents kept, so that a short run repeats data as a long one would
    match_repetition: bool = False  # proxies read so much less of each domain that they repeat it as the target will
    json_key: str = "text"  # key of the text in each JSONL line
    workers: int = 0  # processes; 0: one a core


@dataclass(frozen=True)
class MixturesConfig:
    """How mixtures are drawn: Dirichlet around the tempered prior, as RegMix does."""

    count: int = 512  # mixtures that the surrogate is fitted on
    holdout: int = 64  # mixtures from the same generator that neither fit nor choice ever sees
    repeats: int = 3  # proxies on the prior with other seeds: the noise floor
    temperature: float = 0.5  # exponent on the prior, < 1 flattens it (RegMix)
    min_strength: float = 0.1  # smallest Dirichlet strength: near single domains (RegMix)
    max_strength: float = 5.0  # largest Dirichlet strength: near the prior (RegMix)
    minimum: float = 2e-4  # weights below this become zero (RegMix)
    over_cap: Literal["reject", "project", "ignore"] = "reject"  # draws over a cap: redrawn (RegMix) | scaled | kept
    max_epochs: float = 4.0  # a domain may repeat this often in the target run (Muennighoff et al. 2023)
    domains: tuple[str, ...] = ()  # training domains to mix; empty: all that the shards hold
    design: Literal["random", "maximin", "d_optimal", "law"] = "random"  # as drawn | of many, those that tell most
    rounds: int = 0  # further rounds after `count`: fit, propose a batch by expected improvement, train
    batch: int = 8  # mixtures in such a round
    max_flops: float | None = None  # no further round when all proxies together would pass this; null: no limit

    @property
    def num_proxies(self) -> int:
        """How many are trained at most."""
        return self.count + self.holdout + self.repeats + self.rounds * self.batch


@dataclass(frozen=True)
class SlurmConfig:
    """What sbatch is told about a task of a job array; read when proxies.executor is slurm."""

    partition: str | None = None  # null: the cluster's default
    account: str | None = None  # null: yours
    time: str | None = None  # limit of a task as sbatch takes it, e.g. 2:00:00; null: the partition's
    mem: str | None = None  # memory of a task, e.g. 8G; null: the cluster's default
    gpus: int = 0  # GPUs of a task, proxies.per_gpu proxies on each; 0: one proxy on its CPUs
    chunk: int = 1  # proxies that one task trains; more for short ones, which a queue would hold up
    options: tuple[str, ...] = ()  # further options of sbatch, e.g. --constraint=a100


@dataclass(frozen=True)
class RayConfig:
    """Where Ray is; read when proxies.executor is ray."""

    address: str | None = None  # a cluster's, or auto; null: $RAY_ADDRESS, or Ray is started on this machine


@dataclass(frozen=True)
class ReuseConfig:
    """An earlier search to build on, when domains were added, removed, split or revised."""

    earlier: str | None = None  # its folder; unchanged domains keep the ratio of its optimum; null: search everything
    runs: bool = True  # fit its proxies too, where they still apply; false: take the ratio alone
    free: tuple[str, ...] = ()  # unchanged domains that are searched again all the same
    split: tuple[str, ...] = ()  # old=new1+new2: domains that were made of one
    same: tuple[str, ...] = ()  # domains to take for unchanged although their shards differ


@dataclass(frozen=True)
class ProxiesConfig:
    """How proxies are run. `calibrate` may change losses: the ledger knows; stop_hopeless marks what it estimates."""

    executor: Literal["local", "slurm", "ray"] = "local"  # processes of this machine | job arrays | a Ray cluster
    workers: int = 0  # proxies at a time; 0: what calibration finds fastest; slurm, ray: as many as the cluster runs
    threads: int = 0  # CPU threads of one proxy; 0: what calibration finds fastest, or 1 where it does not measure
    per_gpu: int = 0  # proxies that share a GPU, where there are GPUs; 0: what calibration finds fastest, or 1
    calibrate: tuple[Literal["precision", "micro_batch_size", "loss_chunk", "compile"], ...] = (
        "precision", "micro_batch_size", "loss_chunk", "compile",
    )  # local: keys of proxy that calibration may set for speed; precision only where it is auto  # fmt: skip
    retries: int = 2  # further tries after a crash; a diverged proxy is never tried again
    until_precise: bool = False  # start no more when the optimum moves less than its uncertainty and a run's noise
    stop_hopeless: bool = False  # end a proxy whose early losses are far from the best; needs proxy.eval.every
    slurm: SlurmConfig = field(default_factory=SlurmConfig)  # executor slurm
    ray: RayConfig = field(default_factory=RayConfig)  # executor ray


@dataclass(frozen=True)
class FitConfig:
    """The regression from weights to validation loss."""

    surrogates: tuple[str, ...] = ()  # names in surrogates.py to choose among; empty: all of them
    folds: int = 5  # cross-validation folds
    target: str = "readme"  # validation domain whose loss is minimised
    target_test: str | None = None  # validation domain that only the retrained models are scored on; null: none


@dataclass(frozen=True)
class OptimumConfig:
    """What the weights must obey beyond the caps, and how they are found."""

    bounds: tuple[str, ...] = ()  # a=0.1..0.5, a=0.2 (fixed), a=0 (left out), a+b=..0.6 (together)
    kl: float = 0.0  # nats of loss for a nat of KL(weights | prior): pulls the weights to the prior (Olmix: 0.05)
    max_worse: float | None = None  # no loss may be predicted worse than the prior's by more than this; null: no limit
    pareto: int = 0  # mixtures on the front of the target's losses to solve for; 0: none
    method: Literal["exact", "simulate"] = "exact"  # solved | the mean of the best simulated mixtures, as in RegMix
    samples: int = 1_000_000  # simulate: mixtures drawn from Dirichlet(prior) (RegMix)
    top: int = 100  # simulate: best ones that are averaged (RegMix)
    bootstraps: int = 20  # refits on resampled runs, for the intervals; 0: none


@dataclass(frozen=True)
class ScalesConfig:
    """Runs of other sizes, to see whether what small proxies say holds for larger models."""

    runs: tuple[
        str, ...
    ] = ()  # NAME=PARAMS,TOKENS,MIXTURES.csv,LOSSES.csv | NAME=PARAMS,TOKENS,trials.jsonl | NAME=FOLDER
    target: str | None = (
        None  # PARAMS,TOKENS to predict for; null: train.main where it is enabled, else the largest size
    )


@dataclass(frozen=True)
class DoReMiConfig:
    """DoReMi (Xie et al. 2023): a reference model, a proxy under group DRO, its averaged weights, and again."""

    reference: str = "prior"  # first reference's weights: prior (shares of the tokens), uniform, or a mixture.yaml
    rounds: int = 1  # at most; each further reference is trained on the weights of the round before (GLaM: 3)
    tolerance: float = 1e-3  # rounds end when no weight differs more from the reference's (the paper's)
    reweighting: ReweightingConfig = field(default_factory=ReweightingConfig)  # the proxy's group DRO


@dataclass(frozen=True)
class TrainConfig:
    """The models trained on the result and on its controls."""

    enabled: bool = True  # false: the search ends with mixture.yaml
    mixtures: tuple[Control, ...] = ("optimal", "prior", "uniform", "best_single")  # what to train on
    seeds: int = 2  # runs of each mixture, so that noise is visible
    workers: int = 0  # runs at a time, main.threads or proxies.threads (at least 1) threads each; 0: all cores
    main: Config = field(default_factory=Config)  # the run; its data, seed and folder are filled in


@dataclass(frozen=True)
class SearchConfig:
    """One search. ``python -m regmix_search.run --print-config`` prints it with every default."""

    name: str = "search"  # names the search in its folder and report
    out_dir: str = "runs/{name}"  # where everything goes; {name} is replaced
    method: Literal["regmix", "doremi"] = "regmix"  # many proxies and a regression | a reference and a proxy
    seed: int = 0  # mixtures, folds, proxies and models are functions of it
    target_tokens: int | None = None  # length of the run the mixture is for; null: train.main's total_tokens
    corpus: CorpusConfig = field(default_factory=CorpusConfig)  # stage 1
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)  # stage 2
    shards: ShardsConfig = field(default_factory=ShardsConfig)  # stage 3
    mixtures: MixturesConfig = field(default_factory=MixturesConfig)  # stage 4
    reuse: ReuseConfig = field(default_factory=ReuseConfig)  # stages 4, 6 and 7: an earlier search
    proxies: ProxiesConfig = field(default_factory=ProxiesConfig)  # stage 5: how they run
    proxy: Config = field(default_factory=Config)  # stage 5: what one is, an ordinary training run
    doremi: DoReMiConfig = field(default_factory=DoReMiConfig)  # method doremi: in the place of stages 4 to 7
    fit: FitConfig = field(default_factory=FitConfig)  # stages 6 and 7
    optimum: OptimumConfig = field(default_factory=OptimumConfig)  # stage 7
    scales: ScalesConfig = field(default_factory=ScalesConfig)  # stage 8, with runs of other sizes alone
    train: TrainConfig = field(default_factory=TrainConfig)  # stage 9

    @property
    def run_dir(self) -> Path:
        """The search's folder, with ``{name}`` filled in."""
        return Path(self.out_dir.replace("{name}", self.name))

    @property
    def run_tokens(self) -> int:
        """Tokens of the run that the repetition caps are computed for."""
        return self.target_tokens or self.train.main.schedule.total_tokens


def load_search(path: str | Path | None, preset: str | None = None, overrides: tuple[str, ...] = ()) -> SearchConfig:
    """Reads and checks a search config; a preset is the file ``<preset>.yaml`` beside ``path``.

    Raises ValueError naming the file, the key, the value and the way out.
    """
    if preset is not None:
        folder = Path(path).parent if path is not None else Path("configs/search")
        path = folder / f"{preset}.yaml"
        if not path.is_file():
            known = [p.stem for p in sorted(folder.glob("*.yaml"))]
            raise ValueError(f"--preset {preset}: no file {path}.{nearest(preset, known)}")
    config = load_config(SearchConfig, path, overrides)
    _check(config, str(path or "defaults"))
    return config


def _check(config: SearchConfig, where: str) -> None:
    mixtures, proxies, train = config.mixtures, config.proxies, config.train
    ranges: list[tuple[str, float, float, float]] = [
        ("tokenizer.vocab_size", config.tokenizer.vocab_size, 258, 2**31),
        ("shards.fraction", config.shards.fraction, 1e-9, 1.0),
        ("mixtures.count", mixtures.count, 4, math.inf),
        ("mixtures.holdout", mixtures.holdout, 0, math.inf),
        ("mixtures.repeats", mixtures.repeats, 0, math.inf),
        ("mixtures.temperature", mixtures.temperature, 0, math.inf),
        ("mixtures.min_strength", mixtures.min_strength, 1e-6, math.inf),
        ("mixtures.max_strength", mixtures.max_strength, mixtures.min_strength, math.inf),
        ("mixtures.minimum", mixtures.minimum, 0, 0.5),
        ("mixtures.rounds", mixtures.rounds, 0, math.inf),
        ("mixtures.batch", mixtures.batch, 1, math.inf),
        ("mixtures.max_flops", mixtures.max_flops or 1.0, 1, math.inf),
        ("mixtures.max_epochs", mixtures.max_epochs, 1e-6, math.inf),
        ("proxies.workers", proxies.workers, 0, math.inf),
        ("proxies.threads", proxies.threads, 0, math.inf),
        ("proxies.per_gpu", proxies.per_gpu, 0, math.inf),
        ("proxies.slurm.gpus", proxies.slurm.gpus, 0, math.inf),
        ("proxies.slurm.chunk", proxies.slurm.chunk, 1, math.inf),
        ("proxies.retries", proxies.retries, 0, math.inf),
        ("fit.folds", config.fit.folds, 2, mixtures.count),
        ("optimum.kl", config.optimum.kl, 0, math.inf),
        ("optimum.max_worse", config.optimum.max_worse or 0.0, 0, math.inf),
        ("optimum.pareto", config.optimum.pareto, 0, math.inf),
        ("optimum.samples", config.optimum.samples, config.optimum.top, math.inf),
        ("optimum.top", config.optimum.top, 1, math.inf),
        ("optimum.bootstraps", config.optimum.bootstraps, 0, math.inf),
        ("doremi.rounds", config.doremi.rounds, 1, math.inf),
        ("doremi.tolerance", config.doremi.tolerance, 0, 1),
        ("train.seeds", train.seeds, 1, math.inf),
        ("train.workers", train.workers, 0, math.inf),
        ("target_tokens", config.run_tokens, 1, math.inf),
    ]
    for key, value, low, high in ranges:
        if not low <= value <= high:
            limit = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
            raise ValueError(f"{where}: {key}={value} must be {limit}")
    if proxies.stop_hopeless and not config.proxy.eval.every:
        raise ValueError(f"{where}: proxies.stop_hopeless looks at evaluations on the way: set proxy.eval.every (is 0)")
    if proxies.until_precise and mixtures.repeats < 2:
        raise ValueError(
            f"{where}: proxies.until_precise compares what is left to gain with the noise of one run, which takes "
            f"mixtures.repeats of 2 or more (is {mixtures.repeats})"
        )
    if config.corpus.kind == "none" and not (config.corpus.dir or config.shards.data_dir):
        raise ValueError(
            f"{where}: corpus.kind=none needs your data: set corpus.dir (JSONL) or shards.data_dir (shards)"
        )
    if config.corpus.kind == "local" and config.corpus.dir:
        raise ValueError(f"{where}: corpus.dir is only read with corpus.kind=none; set that, or leave dir out")
    if config.fit.target == config.fit.target_test:
        raise ValueError(
            f"{where}: fit.target and fit.target_test are both {config.fit.target!r}; the test must be unseen"
        )
    if config.method == "doremi" and train.enabled and "best_single" in train.mixtures:
        raise ValueError(f"{where}: train.mixtures: best_single is a surrogate's choice, and method=doremi has none")
