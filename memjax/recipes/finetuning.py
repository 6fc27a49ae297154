"""Fine-tuning from a checkpoint and a data file to an adapter, with every loss and every byte written
down."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from memjax import adapters, models, optim, parallel, remat
from memjax.core.bytes import compiled_bytes, nbytes
from memjax.models.layers import checkpointed
from memjax.ops import linear_cross_entropy
from memjax.recipes import data as data_
from memjax.recipes.attention import parse_attention
from memjax.recipes.checkpoint import Checkpoints, MetricsLog, check_same, read_metrics
from memjax.recipes.evaluate import Evaluation, make_evaluate
from memjax.recipes.formats import Format, codec_of, group_of
from memjax.recipes.generation import continue_tokens
from memjax.recipes.methods import METHODS, Settings, make_adapter
from memjax.recipes.optimizers import OPTIMIZERS, gradient_bytes, make_training
from memjax.recipes.plots import plot_run
from memjax.recipes.report import ByteReport, byte_report, human, residual_bytes, working_bytes
from memjax.recipes.settings import (
    FREE_SETTINGS,
    Dtype,
    FinetuneSettings,
    bound_to_length,
    checked,
    concrete,
    run_folder,
    with_defaults,
)
from memjax.recipes.train import LossFn, check_finite, init_on_mesh, init_state
from memjax.recipes.whole import TrainedWeights
from memjax.weights import lift


class FinetuneResult(NamedTuple):
    """What a fine-tuning run gave; all of it is also in the files of ``out``."""

    out: Path
    theta: Any  # the trained adapter
    losses: list[float]  # of every step, nats per token
    before: Evaluation
    after: Evaluation
    report: ByteReport
    prompt: str  # of the samples
    sample_before: str
    sample_after: str
    tokens_per_second: float  # of the training steps of this process, without compiling
    seconds: float  # of this process, all included


def load_model(model: str, format: Format = "keep", group: int | None = None, dtype: Dtype = "auto") -> models.Model:
    """Loads a model with its weights held as ``format`` says; see `FinetuneSettings`."""
    group = group_of(format, group)
    weights = format if format in ("keep", "dense") else codec_of(format, group)
    return models.load(model, dtype=concrete(dtype), weights=weights)


def make_loss(
    model: models.Model, adapter: Any, settings: FinetuneSettings, *, dropout: bool, mesh: Mesh | None = None
) -> LossFn:
    """Returns the loss of a decoder with an adapter attached: ``(theta, frozen, batch, key) -> (sum,
    count)``; with a mesh, computed there."""

    if mesh is not None:
        checkpoint = functools.partial(checkpointed, remat=settings.remat)
        sums = parallel.on_mesh(_sum_parts(model, settings), mesh, checkpoint=checkpoint)
        return lambda theta, frozen, batch, key: sums(adapter.attach(frozen, theta, key if dropout else None), batch)

    attention = parse_attention(settings.attention)

    def nll(params: Any, batch: data_.Windows) -> tuple[jax.Array, jax.Array]:
        options = {"segment_ids": batch.segment_ids, "attention": attention, "mlp_chunk": settings.mlp_chunk}
        hidden = model.hidden(params, batch.inputs, remat=settings.remat, **options)
        return _nll(model, params, hidden, batch, settings.chunk), batch.weights.sum()

    def loss(theta: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return lift(nll)(adapter.attach(frozen, theta, key if dropout else None), batch)

    return loss


def make_parts(model: models.Model, settings: FinetuneSettings) -> optim.LossParts:
    """Returns the mean loss of a decoder, cut at its layers."""

    def head(params: Any, hidden: jax.Array, batch: data_.Windows) -> jax.Array:
        return _nll(model, params, hidden, batch, settings.chunk) / batch.weights.sum()

    parts = optim.parts_of_stages(_stages(model, settings), head)
    return parts._replace(block=remat.checkpoint(parts.block, settings.remat))


def _sum_parts(model: models.Model, settings: FinetuneSettings) -> optim.LossParts:
    """Returns the sums that `make_loss` gives, cut at the layers of a decoder."""

    def head(params: Any, hidden: jax.Array, batch: data_.Windows) -> tuple[jax.Array, jax.Array]:
        return _nll(model, params, hidden, batch, settings.chunk), batch.weights.sum()

    return optim.parts_of_stages(_stages(model, settings), head)


def _stages(model: models.Model, settings: FinetuneSettings) -> Callable[[data_.Windows], models.Stages]:
    """Returns how a batch goes through the layers of a decoder."""
    options: dict[str, Any] = {"attention": parse_attention(settings.attention), "mlp_chunk": settings.mlp_chunk}
    return lambda batch: model.stages(batch.inputs, segment_ids=batch.segment_ids, **options)


def _nll(model: models.Model, params: Any, hidden: jax.Array, batch: data_.Windows, chunk: int) -> jax.Array:
    """Returns the weighted sum of the losses of a batch."""
    weight, axis = model.head(params)
    options = {"weights": batch.weights, "w_axis": axis, "reduction": "sum", "chunk": chunk}
    return linear_cross_entropy(hidden, weight, batch.targets, **options)


def finetune(settings: FinetuneSettings, console: Console | None = None) -> FinetuneResult:
    """Trains an adapter on frozen weights, or the weights; writes losses, checkpoints, report, picture and samples.

    Args:
      settings: what to do.
      console: where progress and tables are printed; None prints to the standard output.

    Returns:
      `FinetuneResult`; the folder ``out`` holds ``adapter/`` (or, where weights are trained, ``model/``),
      ``checkpoints/``, ``metrics.jsonl``, ``held_out.jsonl``, ``report.json``, ``report.png`` and ``samples.json``,
      and ``start/`` for adapters with constants.

    Raises:
      ValueError: bad settings, model or data; or settings other than those of the run that is resumed.
      FloatingPointError: a loss or gradient that is not finite; the last checkpoint is of a step before it.
      OSError: a file that could not be written.
    """
    started = time.monotonic()
    console = console or Console()
    settings = checked(settings)
    model = load_model(settings.model, settings.format, settings.group, settings.dtype)
    config = model.config
    if not isinstance(config, models.LlamaConfig):
        raise ValueError(f"{settings.model} is an encoder; finetune trains decoders on the next token")
    if model.tokenizer is None:
        raise ValueError(f"{settings.model} has no tokenizer, which the data needs")
    train, held_out = data_.load(
        settings.data,
        model.tokenizer,
        settings.seq,
        context=model.config.max_positions,
        held_out=settings.held_out,
        too_long=settings.too_long,
    )
    held_out = data_.take(held_out, slice(settings.eval_windows))
    prompt = _prompt(settings, model, held_out)
    loader = data_.Loader(train, settings.batch, settings.seed)
    assert settings.targets is not None and settings.lr is not None  # of settings that are checked
    chosen = Settings(settings.rank, settings.alpha, settings.targets, settings.lr)
    adapter = make_adapter(settings.adapter, model.params, chosen, settings.dropout)

    out = run_folder(settings)
    recorded = dataclasses.asdict(settings) | {
        "targets": list(settings.targets),
        "dtype": str(model.params["norm"]["scale"].dtype),
        "data_sha256": data_.digest(data_.find(settings.data)),
    }
    checkpoints = Checkpoints(out, keep=settings.keep)
    if settings.resume:
        saved = with_defaults(checkpoints.settings())
        if saved.get("data_sha256") != recorded["data_sha256"]:
            same = settings.data == saved["data"]
            change = "has changed since the run began" if same else f"is not what the run began with, {saved['data']}"
            raise ValueError(f"cannot resume the run in {out}: the data {settings.data} {change}")
        longer = settings.steps > saved["steps"]
        if longer and (bound := bound_to_length(settings)):
            raise ValueError(
                f"the run in {out} is of {saved['steps']} steps and cannot be made one of {settings.steps}: "
                f"{' and '.join(bound)} would have been another from the start"
            )
        check_same(saved, recorded, (*FREE_SETTINGS, "steps") if longer else FREE_SETTINGS)
    elif checkpoints.steps():
        raise ValueError(f"{out} holds a run already; go on with it by --resume {out}, or choose another --out")
    with console.status("preparing the weights" if settings.adapter == "none" else f"preparing {settings.adapter}"):
        frozen, start = _start(adapter, model.params, settings, out)
    start = _own(start, frozen)  # a training step donates it
    mesh = None if settings.mesh is None else parallel.make_mesh(settings.mesh)
    if mesh is not None:
        if config.num_kv_heads % mesh.shape.get("model", 1):
            raise ValueError(
                f"mesh={settings.mesh} splits heads, but {settings.model} has {config.num_kv_heads} heads of keys"
            )
        places = parallel.shardings((frozen, start), mesh, attach=adapter.attach)
        frozen, start = jax.device_put((frozen, start), places)
    model = dataclasses.replace(model, params=frozen)  # methods that rebase the weights have made others of them
    loss = make_loss(model, adapter, settings, dropout=True, mesh=mesh)
    follow = METHODS[settings.adapter].after
    training = make_training(
        settings, loss, make_parts(model, settings), config.num_layers, follow and follow(settings.steps)
    )
    if mesh is None:
        state = init_state(start, training)
    else:
        state, training = init_on_mesh(start, training)
    if settings.resume:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        del state  # so that there are not two of it
        state = checkpoints.restore(like)
        if int(state.step) >= settings.steps:
            bound = bound_to_length(settings)
            rest = f"{' and '.join(bound)} bound it to its length" if bound else "--steps with more of them trains on"
            raise ValueError(f"the run in {out} is finished: {settings.steps} steps are done; {rest}")
        console.print(f"resuming after step {int(state.step)} of {settings.steps}")
    done = int(state.step)
    out.mkdir(parents=True, exist_ok=True)
    metrics_log = MetricsLog(out / "metrics.jsonl", done)
    # Without a checkpoint, what the log holds of step 0 is another run's.
    held_out_log = MetricsLog(out / "held_out.jsonl", done + 1 if settings.resume else 0)
    evaluations = {row["step"]: row for row in read_metrics(held_out_log.path)}

    def batch_at(step: int) -> data_.Windows:
        batch = loader.batch_at(step)
        return batch if mesh is None else jax.device_put(batch, parallel.batch_sharding(mesh))

    evaluate = make_evaluate(make_loss(model, adapter, settings, dropout=False, mesh=mesh))

    def evaluate_at(steps: int, theta: Any) -> None:
        if steps in evaluations:
            return
        with console.status(f"evaluating {len(held_out.inputs)} held-out sequences"):
            result = evaluate(theta, frozen, held_out, settings.batch)
        evaluations[steps] = {"step": steps, "nll": result.nll, "tokens": result.tokens}
        held_out_log.append(evaluations[steps])
        console.print(f"step {steps}: held-out loss {result.nll:.4f}, perplexity {result.perplexity:.2f}")

    def sample(theta: Any) -> str:
        return continue_tokens(
            model,
            adapter.attach(frozen, theta),
            prompt,
            settings.sample_tokens,
            temperature=settings.temperature,
            key=jax.random.key(settings.seed),
            attention=parse_attention(settings.attention),
        )

    console.print(
        f"{settings.model}: {nbytes(frozen) / 2**20:.1f} MiB frozen, {nbytes(state.theta) / 2**20:.2f} MiB trained; "
        f"{len(train.inputs)} training windows of {settings.seq} tokens"
    )
    if mesh is not None:
        held = (parallel.device_bytes(tree) / 2**20 for tree in (frozen, state.theta, state.opt_state))
        console.print(
            "each of {} devices ({}): {:.1f} MiB of weights, {:.2f} MiB trained, {:.2f} MiB of optimizer state".format(
                mesh.size, settings.mesh, *held
            )
        )
    if OPTIMIZERS[settings.optimizer].kind != "passes":
        console.print(f"remat {settings.remat} keeps of each layer: {remat.NAMED[settings.remat][1]}")
    evaluate_at(0, start)
    sample_before = sample(start)
    del start

    with console.status("compiling the training step"):
        compiled = training.step.lower(state, frozen, batch_at(0)).compile()
    tokens, seconds = 0.0, 0.0
    with _progress(console) as progress:
        bar = progress.add_task("training", total=settings.steps, completed=done, loss=float("nan"), speed=0.0)
        for i in range(done, settings.steps):
            begun = time.monotonic()
            state, metrics = compiled(state, frozen, batch_at(i))
            metrics = jax.device_get(metrics)
            check_finite(metrics, i)
            seconds += time.monotonic() - begun
            tokens += float(metrics.tokens)
            row = {"step": i, "loss": float(metrics.loss)}
            if metrics.grad_norm is not None:
                row["grad_norm"] = float(metrics.grad_norm)
            metrics_log.append(row)
            if i == done + 2:
                size = human(compiled_bytes(compiled).total)
                console.print(f"{tokens / seconds:,.0f} tokens/s in the first three steps; {size} by XLA's count")
            progress.update(bar, completed=i + 1, loss=row["loss"], speed=tokens / seconds)
            # Evaluated first, so that a kill between the two leaves no checkpoint without its evaluation.
            if _due(i + 1, settings.eval_every, settings.steps):
                evaluate_at(i + 1, state.theta)
            if _due(i + 1, settings.save_every, settings.steps):
                metrics_log.sync()
                held_out_log.sync()
                checkpoints.save(state, recorded)
    rows = settings.batch // settings.accumulate
    microbatch = data_.take(loader.batch_at(0), slice(rows))
    activations = residual_bytes(loss, state.theta, frozen, microbatch, jax.random.key(0))
    if mesh is not None:
        activations, rows = activations // mesh.size, rows // parallel.batch_parts(mesh)
    weights = adapter.attach(frozen, state.theta) if isinstance(adapter, TrainedWeights) else frozen
    by_blocks = settings.attention is not None or microbatch.segment_ids is not None
    sizes = (rows, settings.seq, settings.chunk, by_blocks, settings.mlp_chunk)
    activations += working_bytes(config, weights, *sizes)
    by_xla = compiled_bytes(compiled)
    if mesh is not None:  # where arrays that the step does not use are no arguments of it, and are held all the same
        by_xla = by_xla._replace(argument=max(by_xla.argument, parallel.device_bytes((state, frozen, batch_at(0)))))
    gradients = gradient_bytes(settings, state.theta, config.num_layers)
    report = byte_report(frozen, state, by_xla, activations, gradients)
    checkpoints.close()
    if isinstance(adapter, TrainedWeights):
        models.save(out / "model", dataclasses.replace(model, params=adapter.attach(frozen, state.theta)))
    else:
        adapter.save(out / "adapter", state.theta, frozen)
    sample_after = sample(state.theta)
    before, after = (Evaluation(evaluations[at]["nll"], evaluations[at]["tokens"]) for at in (0, settings.steps))
    losses = [row["loss"] for row in read_metrics(metrics_log.path)]
    result = FinetuneResult(
        out,
        state.theta,
        losses,
        before,
        after,
        report,
        model.tokenizer.decode(prompt),
        sample_before,
        sample_after,
        tokens / seconds if seconds else 0.0,
        time.monotonic() - started,
    )
    _write(result, recorded, [(row["step"], row["nll"]) for row in evaluations.values()])
    _show(result, console)
    return result


def _start(
    adapter: adapters.Adapter | TrainedWeights, params: Any, settings: FinetuneSettings, out: Path
) -> tuple[Any, Any]:
    """Returns the frozen tree and the adapter at its start; both the same, bit by bit, when a run is resumed.

    Constants that come from the weights, such as singular vectors, might not come out alike a second time: a run with
    constants keeps its start in ``start/``.
    """
    if isinstance(adapter, TrainedWeights):
        return adapter.prepare(jax.random.key(settings.seed), params)
    if settings.resume and adapter.anchored:
        return adapters.load(out / "start", params)[1:]
    frozen, theta = adapter.prepare(jax.random.key(settings.seed), params)
    if adapter.anchored:
        adapter.save(out / "start", theta, frozen)
    return frozen, theta


def _own(tree: Any, others: Any) -> Any:
    """Returns ``tree`` with copies of those arrays that are also elsewhere in it or in ``others``, and no more."""
    held = {id(leaf) for leaf in jax.tree.leaves(others)}

    def own(leaf: Any) -> jax.Array:
        shared = id(leaf) in held
        held.add(id(leaf))
        return jnp.copy(leaf) if shared else jnp.asarray(leaf)

    return jax.tree.map(own, tree)


def _prompt(settings: FinetuneSettings, model: models.Model, held_out: data_.Windows) -> list[int]:
    """Returns the tokens of the prompt; by default the start of the held-out data.

    Of documents, that is what comes before the first target that counts; of text, what follows the first line break
    in the first half of a window.
    """
    if settings.prompt is not None:
        prompt = model.tokenizer.encode(settings.prompt)
    elif held_out.segment_ids is None:
        text = model.tokenizer.decode(held_out.inputs[0, : max(1, settings.seq // 2)].tolist())
        prompt = model.tokenizer.encode(text.partition("\n")[2].strip() or text)
    else:
        prompt = held_out.inputs[0, : int(held_out.weights[0].argmax()) + 1].tolist()
    if not prompt:
        raise ValueError("the prompt for samples has no tokens")
    if len(prompt) + settings.sample_tokens > model.config.max_positions:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and sample_tokens={settings.sample_tokens} exceed the model's context "
            f"of {model.config.max_positions}"
        )
    return prompt


def _due(steps_done: int, every: int, steps: int) -> bool:
    return steps_done == steps or (every > 0 and steps_done % every == 0)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )


def _write(result: FinetuneResult, settings: dict[str, Any], held_out: list[tuple[int, float]]) -> None:
    """Writes report.json, samples.json and report.png."""
    summary = {
        "settings": settings,
        "held_out": {
            name: {"nll": e.nll, "perplexity": e.perplexity, "tokens": e.tokens}
            for name, e in (("before", result.before), ("after", result.after))
        },
        "bytes": result.report.as_dict(),
        "tokens_per_second": result.tokens_per_second,
        "seconds": result.seconds,
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
    }
    (result.out / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    samples = {"prompt": result.prompt, "before": result.sample_before, "after": result.sample_after}
    (result.out / "samples.json").write_text(json.dumps(samples, indent=2) + "\n", encoding="utf-8")
    rank = "" if settings["rank"] is None else f" rank {settings['rank']}"
    title = f"{Path(settings['model']).name}, {settings['adapter']}{rank}, on {settings['data']}"
    plot_run(result.out / "report.png", result.losses, sorted(held_out), result.report, title)


def _show(result: FinetuneResult, console: Console) -> None:
    console.print(result.report.table())
    before, after = result.before, result.after
    console.print(
        f"held-out loss {before.nll:.4f} -> {after.nll:.4f} nats ({after.nll - before.nll:+.4f}), "
        f"perplexity {before.perplexity:.2f} -> {after.perplexity:.2f}"
    )
    texts = {"prompt": result.prompt, "before": result.sample_before, "after": result.sample_after}
    for name, text in texts.items():
        console.print(f"[bold]{name}:[/bold]", end=" ")
        console.print(text.strip(), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{result.tokens_per_second:,.0f} tokens/s while training, {result.seconds:.0f} s in all; files in {result.out}"
    )
