"""The whole comparison: pretrain where needed; every task, method, rate and seed; what each run reached, cost and forgot."""

import contextlib
import copy
import math
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from torch import nn

from .._screen import one_line
from ..measure.environment import environment
from ..tasks.forgetting import Forgetting
from ..tasks.rows import pad
from ..tasks.score import token_losses
from ..tasks.task import Example, Task
from . import budget, probe, train
from .agreement import agreement
from .budget import Budget
from .checks import check_asked, check_base, rehearse
from .comparison import Comparison, Costs, MethodRuns, TaskRuns
from .costs import latency, merged, weight_changes
from .data import PASSAGE, Subject, blocks, general_corpus, load
from .methods import method_of
from .progress import Stages, stages
from .rates import grid, sweep
from .records import Records, budget_of, key_of
from .settings import RUNS, SAVED, Settings, is_examples
from .teaching import Teach, generated, teachings
from .verdict import invented

LAST = ".last"  # the run that just ended, until it is known whether it is picked


def compare(settings: Settings, save: Callable[[Comparison], None] = lambda comparison: None) -> Comparison:
    """Everything that takes time.  save(comparison) follows a method that is done in a task; its runs are on disk one by one.

    Raises: ValueError if none of the methods can be done to the model, or no plan fits ``settings.minutes``.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    began = time.perf_counter()
    subject = load(settings)
    device = torch.device(settings.device)
    if not subject.embedded:
        check_base(subject, device)
    tasks = teachings(settings, subject)
    if not subject.embedded:
        firsts = [row for teach in tasks.values() for row in teach(settings.seed).trained()]
        check_asked(f"--model {subject.name}: {type(subject.model).__name__}", subject.model, subject.tokenizer, firsts)
    comparison = Comparison(settings, subject, environment(device), not_done=rehearse(settings, subject))
    _some_left(comparison)
    with stages() as screen, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        if subject.embedded:
            comparison.pretraining = _pretrain(settings, subject, device, screen)
            for parameter in subject.model.parameters():  # buffers stay, as where a checkpoint is loaded
                parameter.data = parameter.data.to(getattr(torch, settings.dtype))
        if subject.invented:
            screen.line(invented(subject.name, subject.invented))
        for name, why in comparison.not_done.items():
            screen.line(_not_done(name, why))
        if "lora" in {name.partition(":")[0] for name in settings.names} - comparison.not_done.keys():
            with _or_why_not(comparison, "agreement", screen):
                task = next(iter(tasks.values()))(settings.seed)
                batch = pad(next(task.batches(min(subject.batch, 4), 1)), subject.tokenizer.pad)
                comparison.agreement = agreement(subject.model, batch, settings.adapter("lora"), device, settings.seed)
        if settings.minutes is not None:
            kept = budget_of(settings.out / RUNS) if settings.resume else None
            if kept:
                screen.line("the plan of the runs that are there stays, whatever --minutes says now")
            comparison.budget = Budget(**kept) if kept else _fitted(comparison, tasks, device, screen, began)
            if comparison.budget.length != subject.length:
                shorter = replace(settings, length=comparison.budget.length)
                general = general_corpus(shorter, subject.tokenizer, shorter.length)
                comparison.subject = subject = replace(subject, general=general, length=shorter.length)
                tasks = teachings(shorter, subject)
        digests = {name: teach(settings.seed).digest for name, teach in tasks.items()} | {
            "general": subject.general.digest
        }
        same = replace(settings, length=subject.length, batch=subject.batch)
        key = key_of(same, subject.model, subject.tokenizer, digests)
        records = Records(settings.out / RUNS, key, settings.resume)
        began -= records.seconds()
        if comparison.budget:
            records.save_budget(asdict(comparison.budget))
        work = _Work(comparison, tasks, records, device, screen, began, save)
        work.do()
        _some_left(comparison)
    comparison.seconds, comparison.complete = time.perf_counter() - began, True
    return comparison


@contextlib.contextmanager
def _or_why_not(comparison: Comparison, name: str, screen: Stages):
    """What fails inside is noted, and the comparison goes on."""
    try:
        yield
    except Exception as error:  # whatever this model makes a library raise
        comparison.not_done[name] = one_line(error)
        screen.line(_not_done(name, comparison.not_done[name]))


def _not_done(name: str, why: str) -> str:
    return f"{name} not done: {why.removeprefix(f'{name}: ')}"


def _some_left(comparison: Comparison) -> None:
    left = [name for name in comparison.settings.names if name not in comparison.not_done]
    if not left or (comparison.tasks and not comparison.any_run):
        reasons = "; ".join(f"{name}: {why}" for name, why in comparison.not_done.items())
        raise ValueError(f"--methods: none can be done to {type(comparison.subject.model).__name__}: {reasons}")


def _pretrain(settings: Settings, subject: Subject, device: torch.device, screen: Stages) -> dict:
    size = settings.embedded
    start = time.perf_counter()
    with screen.stage("pretrain on " + subject.general.source, size.pretrain_steps) as stage:
        losses = train.pretrain(subject, size.pretrain_steps, size.pretrain_rate, settings.seed, device, stage.tick)
        stage.result = f"loss {losses[-1]:.3f}"
    return {
        "steps": len(losses),
        "seconds": time.perf_counter() - start,
        "rate": size.pretrain_rate,
        "loss": losses[-1],
    }


def _fitted(
    comparison: Comparison, tasks: dict[str, Teach], device: torch.device, screen: Stages, began: float
) -> Budget:
    """Times two steps of every method in every task, and one evaluation, and chooses what fits."""
    settings, subject = comparison.settings, comparison.subject
    base = copy.deepcopy(subject.model).to(device)
    forgetting = Forgetting(subject.tokenizer, subject.general.test, base)
    costs, evaluations, ahead = {}, {}, _context_seconds(settings, subject, base, tasks)
    with screen.stage("time two steps of each method", sum(map(len, settings.methods.values()))) as stage:
        start = time.perf_counter()
        if forgetting.diverse:
            forgetting.diversity(base, settings.seed)
        diversity = time.perf_counter() - start
        for name, teach in tasks.items():
            task = teach(settings.seed)
            start = time.perf_counter()
            tokens = _tokens(base, lambda task=task: {**forgetting.measure(base), **task.measure(base)})
            alone = time.perf_counter() - start
            ahead += settings.seeds * alone
            steps = settings.steps_of(name)
            points = budget.points(steps, _step_tokens(task, subject.batch), tokens)
            evaluations[name] = points if task.constant_rate else 1
            for method in settings.methods[name]:
                if method in comparison.not_done:
                    continue
                with _or_why_not(comparison, method, screen):
                    costs[name, method] = _cost(settings, subject, task, method, device, forgetting, diversity / alone)
                stage.tick()
    ahead += time.perf_counter() - began
    return budget.fitted(costs, evaluations, settings, _lengths(settings, subject), settings.minutes, ahead)


def _lengths(settings: Settings, subject: Subject) -> list[int]:
    """What sequences may be shortened to: nothing where a length or examples are given, nor below what a task fits into."""
    if settings.length is not None or subject.embedded or is_examples(settings.data):
        return [subject.length]
    lengths = []
    for length in budget.halves(subject.length):
        try:
            for name in settings.tasks:
                if name != "text":
                    generated(name, settings, subject.tokenizer, length, settings.seed)
        except ValueError:  # a row of it is longer
            break
        lengths.append(length)
    return lengths


def _cost(settings: Settings, subject: Subject, task: Task, method: str, device, forgetting: Forgetting, texts: float):
    """texts: how many evaluations take as long as the diversity of the base's texts."""
    evaluation = 0.0

    def measure(model: nn.Module) -> train.Measures:
        nonlocal evaluation
        start = time.perf_counter()
        measured = {**forgetting.measure(model), **task.measure(model)}
        evaluation = time.perf_counter() - start
        return measured

    plan, start = train.Plan(4, subject.batch, 1, settings.replay), time.perf_counter()
    run = train.train(
        subject,
        task,
        method_of(method),
        1e-6,
        settings.seed,
        plan,
        adapter=settings.adapter(method),
        device=device,
        measure=measure,
        in_place=settings.in_place,
    )
    around = time.perf_counter() - start - sum(run.seconds) - evaluation  # the copy, the adapter and the validation
    step = max(run.seconds) * (1 + 1 / train.PROBE if method_of(method).subnetwork else 1)
    return budget.Cost(step, evaluation, max(around, 0.0) + texts * evaluation)


def _context_seconds(settings: Settings, subject: Subject, base: nn.Module, tasks: dict[str, Teach]) -> float:
    """Of examples in the context, from one batch's tokens per second."""
    if subject.embedded:
        return 0.0
    sets = probe.calibrations(subject.tokenizer, probe.positions(base), settings.seed, probe.EXAMPLES)
    if settings.data is not None:
        sets |= {probe.YOURS + name: teach(settings.seed).examples()[: probe.EXAMPLES] for name, teach in tasks.items()}
    rows = [example.row for examples in sets.values() for example in examples]
    start = time.perf_counter()
    token_losses(base, rows, subject.tokenizer.pad)
    return (time.perf_counter() - start) * probe.TIMES


def _tokens(model: nn.Module, work: Callable[[], object]) -> int:
    """Tokens that the model's calls in ``work`` see, a call of few counted as CALL."""
    seen = 0

    def count(module, args, kwargs) -> None:
        nonlocal seen
        ids = kwargs.get("input_ids")
        seen += max(budget.CALL, ids.numel() if ids is not None else 0)

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        work()
    finally:
        hook.remove()
    return seen


def _step_tokens(task: Task, batch: int) -> int:
    rows = next(task.batches(batch, 1))
    return batch * max(len(row.ids) for row in rows)


class _Work:
    """All runs of one comparison, task by task and method by method."""

    def __init__(self, comparison: Comparison, tasks, records: Records, device, screen: Stages, began, save):
        self.comparison, self.settings, self.subject = comparison, comparison.settings, comparison.subject
        self.tasks, self.records, self.device, self.screen = tasks, records, device, screen
        self.began, self.save = began, save

    def do(self) -> None:
        self._bases()
        self._estimate()
        for name, runs in self.comparison.tasks.items():
            for method in self.settings.methods[name]:
                if method not in self.comparison.not_done:
                    with _or_why_not(self.comparison, f"{name}: {method}", self.screen):
                        self._method(name, runs, method)
                    self.comparison.seconds = time.perf_counter() - self.began
                    self.save(self.comparison)

    def _bases(self) -> None:
        """What is right, lost and valid before any training, of every task and seed; and with that the tasks' plans."""
        model, chosen = copy.deepcopy(self.subject.model).to(self.device), self.comparison.budget
        self.comparison.forgetting = Forgetting(self.subject.tokenizer, self.subject.general.test, model)
        seeds = range(self.settings.seed, self.settings.seed + self.settings.seeds)
        with self.screen.stage("the model before training", len(self.tasks) * len(seeds)) as stage:
            for name, teach in self.tasks.items():
                base, of_seeds = {}, {seed: teach(seed) for seed in seeds}
                for seed, task in of_seeds.items():
                    measured: train.Measures = {}
                    tokens = _tokens(model, lambda: measured.update(self._measure(task, model)))  # noqa: B023
                    base[seed] = train.Point(0, 0.0, measured)
                    stage.tick()
                first, steps = of_seeds[self.settings.seed], self.settings.steps_of(name)
                steps = chosen.steps(steps) if chosen else steps
                points = budget.points(steps, _step_tokens(first, self.subject.batch), tokens)
                points = points if first.constant_rate else 1  # only the end of a cosine says what it reaches
                plan = train.Plan(steps, self.subject.batch, points, self.settings.replay)
                unseen = [example.row for example in first.unseen()[: probe.EXAMPLES]]
                alone = self._nats(model, unseen) if unseen else math.nan
                self.comparison.tasks[name] = TaskRuns(of_seeds, plan, base, alone)
        if not self.subject.embedded:
            self._probe(model)

    def _probe(self, model: nn.Module) -> None:
        """Of the tasks' examples, by the tasks' names, and of the generated sets, by theirs."""
        room = probe.positions(model)
        sets = probe.calibrations(self.subject.tokenizer, room, self.settings.seed, probe.EXAMPLES)
        if self.settings.data is not None:
            for name, runs in self.comparison.tasks.items():
                sets[probe.YOURS + name] = probe.distinct(self._shown(runs.task))[: probe.EXAMPLES]
        with self.screen.stage("examples in the context", len(sets)) as stage:
            self.comparison.probed, why_not = probe.probe(
                model, self.subject.tokenizer, sets, seed=self.settings.seed, tick=lambda name: stage.tick()
            )
            stage.result = "; ".join(why_not.values())

    def _shown(self, task: Task) -> Sequence[Example]:
        """Of running text passages, so short that eight fit a context, as ``lowrank probe`` cuts them."""
        if is_examples(self.settings.data):
            return task.examples()
        return blocks(self.settings.data, self.subject.tokenizer, min(self.subject.length, PASSAGE))

    def _nats(self, model: nn.Module, rows) -> float:
        """Mean nats per labelled token."""
        return float(torch.cat(token_losses(model, rows, self.subject.tokenizer.pad)).mean())

    def _estimate(self) -> None:
        """Printed before the runs, where a budget was asked for; without one nothing has been timed yet."""
        if self.comparison.budget:
            chosen = self.comparison.budget
            plans = "; ".join(f"{name}: {runs.plan.steps} steps" for name, runs in self.comparison.tasks.items())
            rates = "three rates" if chosen.rates > 1 else "one rate"
            rates = f"{rates} or those given" if self.settings.rates else rates
            self.screen.line(
                f"about {budget.words(chosen.seconds)}: {plans}; {rates} a method, sequences of {chosen.length} tokens"
            )

    def _measure(self, task: Task, model: nn.Module) -> train.Measures:
        return {**self.comparison.forgetting.measure(model), **task.measure(model)}

    def _method(self, name: str, runs: TaskRuns, method: str) -> None:
        rates = list(self.settings.rates.get(method, ()))
        chosen = rates or grid(
            method_of(method),
            self.subject.model.get_input_embeddings().embedding_dim,
            self.settings.adapter(method),
            self.comparison.budget.rates if self.comparison.budget else 3,
        )
        done = runs.methods.setdefault(method, MethodRuns())
        for run in sweep(lambda rate: self._run(name, runs, method, rate, self.settings.seed), chosen, not rates):
            done.sweep.append(run)
            self._saved(done, name, method, run)
        if self.settings.save and not done.picked.diverged and not self._folder(name, method).exists():
            self.comparison.not_done[f"saving {name}: {method}"] = "its run is an earlier one's, which did not --save"
        if done.picked.diverged:
            raise ValueError(f"diverged at every rate: {', '.join(f'{run.rate:g}' for run in done.sweep)}")
        for seed in range(self.settings.seed + 1, self.settings.seed + self.settings.seeds):
            done.more.append(self._run(name, runs, method, done.picked.rate, seed))

    def _run(self, name: str, runs: TaskRuns, method: str, rate: float, seed: int) -> train.Run:
        task = runs.of_seeds[seed]
        label = f"{name}: {method} at {rate:g}" + (f", seed {seed}" if self.settings.seeds > 1 else "")
        run = self.records.load(name, method, rate, seed, runs.plan.steps) if self.settings.resume else None
        if run is None:
            shutil.rmtree(self.settings.out / SAVED / LAST, ignore_errors=True)  # of a run that was interrupted
            with self.screen.stage(label, runs.plan.steps) as stage:
                run = train.train(
                    self.subject,
                    task,
                    method_of(method),
                    rate,
                    seed,
                    runs.plan,
                    adapter=self.settings.adapter(method),
                    device=self.device,
                    measure=lambda model: self._measure(task, model),
                    in_place=self.settings.in_place,
                    tick=stage.tick,
                    after=lambda run, model: self._finish(name, runs, method, run, model),
                )
                stage.result = self._result(task, run)
            self.records.save(name, method, run)
            self.records.save_seconds(time.perf_counter() - self.began)
        elif method not in self.comparison.costs:
            self.comparison.costs[method] = Costs(**self.records.load_costs(method))
        run.points.insert(0, runs.base[seed])
        return run

    def _result(self, task: Task, run: train.Run) -> str:
        if run.diverged:
            return "diverged"
        end = run.points[-1]
        rise = end.mean("general") - self.comparison.tasks[task.name].base[run.seed].mean("general")
        return f"{task.learnt.replace('_', ' ')} {end.mean(task.learnt):.3f}, general loss {rise:+.3f}"

    def _finish(self, name: str, runs: TaskRuns, method: str, run: train.Run, model: nn.Module) -> None:
        """What needs the trained model.  The run is done: a figure that cannot be taken costs that figure alone."""
        forgetting, costs = self.comparison.forgetting, self.comparison.costs.get(method)
        if costs is None:
            costs = self.comparison.costs[method] = Costs()
            self._costs(costs, method, runs.task, model)
            self.records.save_costs(method, asdict(costs))
        if run.seed == self.settings.seed:
            with _noted(costs, "weight changes"):
                run.changes = weight_changes(self.subject.model, model)
            with _noted(costs, "loss on examples"):
                unseen = [example.row for example in runs.task.unseen()[: probe.EXAMPLES]]
                shown = unseen, runs.task.trained()[: probe.EXAMPLES]
                run.shown = tuple(self._nats(model, rows) for rows in shown) if unseen else None
            if forgetting.diverse:
                with _noted(costs, "diversity of formats"):
                    run.diversity = forgetting.diversity(model, run.seed)
            if self.settings.save:
                _keep(model, self.settings.out / SAVED / LAST)

    def _costs(self, costs: Costs, method: str, task: Task, model: nn.Module) -> None:
        import lowrank

        if method != "full":
            costs.paths = lowrank.stats(model)
        rows = next(task.batches(self.subject.batch, 1))
        shortest = min(len(row.ids) for row in rows)
        batch = torch.tensor([row.ids[:shortest] for row in rows], device=self.device)
        for key, measured in (("unmerged", lambda: model), ("merged", lambda: merged(model))):
            with _noted(costs, f"{key} forward"):
                costs.latency[key] = latency(measured(), batch)

    def _saved(self, done: MethodRuns, name: str, method: str, run: train.Run) -> None:
        """The picked run's files take the place of those of the one picked before."""
        last, folder = self.settings.out / SAVED / LAST, self._folder(name, method)
        if not last.exists():
            return
        if run is done.picked:
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            last.rename(folder)
        else:
            shutil.rmtree(last)

    def _folder(self, name: str, method: str):
        return self.settings.out / SAVED / name / method.replace("→", "-to-").replace(":", "-r")


def _keep(model: nn.Module, folder) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)


@contextlib.contextmanager
def _noted(costs: Costs, what: str):
    try:
        yield
    except Exception as error:  # whatever this model makes a library raise
        costs.not_measured[what] = one_line(error)
