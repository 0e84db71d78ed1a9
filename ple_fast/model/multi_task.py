"""The network of ``network.py`` with what is done to it: trained, read, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ple_fast_encoder.caller import warn_caller
from ple_fast_encoder.columns import to_json
from ple_fast_encoder.tables import Array, Table

from ..scalars import check_count, check_flag, check_seed, shown
from . import storage
from .arguments import check_ranks, warn_of_unlabelled
from .batches import BATCH_SIZE, rows_at_once
from .callbacks import Callbacks
from .checkpoint import check_place
from .columns import Encoded
from .configuration import task_to_json
from .eval_view import is_training
from .evaluation import evaluation, gate_weights, predictions
from .history import Evaluation, History
from .labels import SampleWeight, measured_tasks, warn_of_scale
from .large_tables import warn_of_large_tables
from .metrics import Metrics, metrics_by_task
from .network import TaskNetwork
from .parts import Parts
from .progress import Progress, reporter
from .rebuild import rebuilt, saved_form
from .rows import RowParts, Rows, rows_of
from .run import MakeSchedule, Run, run_for
from .scoring import Score, Scorer, checked_metrics, warn_of_unweighted, with_validation
from .served import ServedModel
from .training import UNTRAINED, Trainer
from .updates import Updates


class MultiTaskModel(TaskNetwork):
    """Embeddings of a table's columns, a trunk, one tower (MLP) per task, and their joint loss.

    Initial weights come from PyTorch's global generator: call ``torch.manual_seed`` before.

    Args:
        columns: :class:`Categorical`, :class:`Hashed` and :class:`Numeric`; :func:`columns_from` makes them of training
            data.
        tasks: :class:`~ple_fast.losses.TaskLoss`, names unique.
        trunk: ``"ple"``, ``"cgc"``, ``"mmoe"``, ``"ml_mmoe"``, ``"adatt"``, ``"stem"``, ``"home"``,
            ``"cross_stitch"``, ``"hard_sharing"``, ``"customized_sharing"``, ``"asymmetric_sharing"`` or
            ``"single_task"``; a module, or a function that takes ``in_features`` and returns one, from
            ``(B, in_features)`` to ``(B, T, H)``.
        trunk_options: keywords of the named trunk's class (``PLE``, ``CGC``, ...), of values that JSON can hold. Tasks
            in them, as in ``groups`` of ``HoME``, are names or numbers.
        tower_units: widths of each tower's hidden layers, in front of its output.
        tower_activation: one of relu, leaky_relu, prelu, gelu, silu, tanh, sigmoid.
        tower_dropout: behind each hidden layer of the towers.
        given: for events in a chain (ESMM): ``{"purchase": "click"}`` says that the tower of "purchase" predicts the
            probability given a click, and that the task's output is the product with that of "click". Both are binary,
            and the condition stands before in ``tasks``.
        task_columns: names of the columns that a task reads, by task, ``{"click": ["age", "country"]}``; a task that is
            not in it reads all. The slot of a task reads its own columns, a shared slot those that every task may read.
            A column that would reach a task that must not read it, by whatever path through the trunk or ``given``, is
            a ValueError that names the path.
        domain_columns: names of the columns that say where a row comes from (EPNet of PEPNet, KDD 2023): a gate of
            their embeddings, and of all others, scales what the trunk reads, feature by feature, by 0 to 2.
        personal_columns: names of the columns of user and item (PPNet of PEPNet): gates of their embeddings, one for
            each task and layer, scale what the layers of the towers read, by 0 to 2; see :class:`~ple_fast.PPNet`.
        prior_gate_units: width of the hidden layer of these gates; None: of each that of what it scales.
        sparse_embeddings: gradients of ``embedding.tables.*.weight`` are sparse: a step costs what its batch reads of a
            table, and not what the table has. :meth:`fit` then has an optimizer of their own for them.
        task_embeddings: each slot of the trunk has embeddings of its own: each task, and what is shared between them.
            The trunk has a slot for each task (``"stem"``, which is made for it, ``"ple"``, ``"cgc"``, ``"adatt"``,
            ``"cross_stitch"``). Tables are as much wider, and a batch reads as many rows of them.
        balance, balance_weight, process_group: see :class:`~ple_fast.losses.JointLoss`; ``balance`` needs a trunk with
            gates.

    Raises:
        TypeError: an argument of another type, or an option that the trunk does not have.
        ValueError: a column or task twice, an unknown trunk or activation, a trunk that does not return ``(B, T, H)``,
            or has no slot for each task that has embeddings of its own, or a column that is hidden from a task and
            would reach it.
    """

    _run: Run | None = None
    """What the last call of ``fit`` hands on to the next."""

    def fit(
        self,
        data: Table | Encoded | Parts,
        labels: Table | None = None,
        *,
        epochs: int = 1,
        batch_size: int | None = None,
        lr: float = 1e-3,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        embedding_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        schedule: MakeSchedule | None = None,
        schedule_every: Literal["epoch", "batch"] = "epoch",
        clip_norm: float | None = None,
        sample_weight: SampleWeight = None,
        validation: tuple[Any, ...] | float | None = None,
        metrics: Metrics = None,
        score: Score | str | None = None,
        patience: int | None = None,
        seed: int = 0,
        callbacks: Sequence[Any] = (),
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
        progress: bool | Progress | None = None,
    ) -> History:
        """Trains on all rows of ``data``, in an order of its own generator.

        Every module stays in the mode it is in: of what ``eval()`` was called on before, dropout is off and batch norm
        keeps its statistics.

        A later call goes on where the last one ended, with the next order of the rows and the optimizer with its state:
        three calls with ``epochs=1`` are one with ``epochs=3``. Another ``seed``, ``lr``, optimizer, ``schedule`` or
        ``schedule_every`` (another function; a ``functools.partial`` is the same if its parts are equal), other
        trainable parameters (or elsewhere, or of another dtype) and ``load_state_dict`` begin anew. The optimizer and
        its schedule alone are new ones after a call that raised, or that put the weights of an earlier epoch back,
        because their state is not that of the weights. The state stays in memory with the model, and is no part of its
        copies, pickles and files.

        Args:
            data: columns by name, or what :meth:`encode` made of them; or such tables one after the other, of which one
                at a time is in memory: :class:`ParquetTables`, a list, a ``DataLoader``, any object whose ``__iter__``
                begins anew in each epoch. Rows change places within such a part. The batches of a ``DataLoader`` are
                taken as they are.
            labels: by task, ``(N,)``; NaN where a label is missing (multiclass: also -1). None: they are columns of the
                table, by the names of the tasks. A part is a table with them, or ``(table, labels)``, or ``(table,
                labels, sample_weight)``.
            epochs, batch_size, lr: the last batch is smaller; a single row left over joins the batch before. The
                default of ``batch_size`` is 1,024.
            optimizer: called as ``optimizer(parameters, lr=lr)``; ``functools.partial`` sets more.
            embedding_optimizer: of the tables of a model with ``sparse_embeddings=True``, of which ``optimizer`` then
                gets the other parameters; called as ``embedding_optimizer(tables, lr=lr)``. None is
                ``torch.optim.SparseAdam``; Adagrad and SGD (without weight decay) take sparse gradients, too.
            schedule: of the learning rate: called as ``schedule(optimizer)``, gives a scheduler of
                ``torch.optim.lr_scheduler``, such as ``functools.partial(StepLR, step_size=2, gamma=0.5)``. It goes on
                with the optimizer in a later call; one of a fixed number of steps (``OneCycleLR``) that has done all of
                them begins anew there, and one that would end before the last epoch is refused beforehand.
                ``ReduceLROnPlateau``, whose mode is ``"min"``, is shown a number that falls as the score rises, or
                without validation data with the loss of training.
            schedule_every: whether the scheduler's ``step`` is called after each ``"epoch"`` or each ``"batch"``, of
                which an epoch has ``ceil(N / batch_size)``, one less where a single row is left over.
            clip_norm: gradients whose norm, of all parameters together, is above this are scaled down to it.
            sample_weight: of each row, 0 or more: one column ``(N,)`` for all tasks, or a table of columns by task,
                where a task that is absent weighs its rows alike; or the name of a column of the data, or names by
                task. A task's loss is the weighted mean over its sample space, so a weight of 0 takes a row out of it.
            validation: ``(data, labels)``, ``(data, labels, sample_weight)`` or data with its labels, scored after each
                epoch, in eval mode; of data in parts labels and predictions are kept in memory. Or a share of the rows
                in memory, such as 0.1, which ``seed`` draws and which are then not trained on.
                The weights of this call's best epoch are restored at the end, also when training is interrupted.
            metrics: of the validation data, each over the task's own sample space, weighted as its loss is. Names:
                ``"auc"``, ``"average_precision"`` (binary; need scikit-learn), ``"logloss"``, ``"accuracy"`` (binary,
                multiclass), ``"rmse"``, ``"mae"`` (regression); functions that are called as scikit-learn's are,
                ``f(labels, predictions)``, with ``sample_weight=`` where there are weights and they take it; metrics of
                torchmetrics. One; several, of which a name goes to the tasks that it is for and a function to all; or
                several by task, ``{"click": {"auc"}, "watch": [function]}``. One that is undefined (an AUC of one
                class, a function that gives NaN) is None.
            score: the number that is watched: which epoch is the best, and when ``patience`` ends. A function of the
                predictions (see :meth:`predict`) and the validation labels, higher is better; or a name: ``"loss"``
                (the default: the joint loss), ``"auc"`` (the mean over the tasks that it is for), ``"click/auc"``,
                ``"click/loss"``; or the name of a function or metric in ``metrics``, ``"gini"`` or ``"click/gini"``,
                higher is better, ``"-gini"`` lower is better (torchmetrics' say it themselves). An epoch where it is
                undefined has no score.
            patience: stop after so many epochs without a better score; ``history.stopped`` says so.
            seed: of the order of the rows, and of those that ``validation=0.1`` holds back.
            callbacks: objects with some of the methods of :class:`Callback`, called before and after each epoch and
                after each step.
            checkpoint: a file that is written after each epoch, before the callbacks, and replaced in one step: all
                that the rest of the training depends on, so that a run which was killed goes on from it.
            checkpoint_every: batches after which it is also written.
            resume: go on from ``checkpoint`` where there is one: in mid-epoch, and on the machine that wrote it with
                the same numbers as if nothing had happened. ``epochs`` counts those that ran before. One of other
                settings (rows, ``batch_size``, ``optimizer``, ...) is refused. False begins anew, and replaces it.
            progress: None shows each epoch on standard output: on a terminal a bar (with rich, where it is installed)
                that becomes a line, elsewhere a line. True is the same, and an error where rich is missing. False is
                silent, and so is a function, which is called with a :class:`Step` after each batch.

        Returns:
            One result per epoch that ran, as a list that ``to_frame()`` makes a data frame of. An exception that ends
            the training, such as Ctrl-C's KeyboardInterrupt, has it as ``error.history``.

        Warns:
            UserWarning: the whole model is in eval mode; a task has no label in ``labels``, or none in the validation
                labels (where no task has any, the default score is None, and nothing is stopped or restored by it); the
                score of an epoch is undefined; a metric takes no weights and there are some; labels of a regression are
                far from 1 and not standardised; a table with dense gradients is much larger than what a batch reads of
                it; ``torch.distributed`` is initialised with several ranks, of which each trains a model of its own.

        Raises:
            TypeError: an argument of another type, or an ``embedding_optimizer`` that takes no sparse gradients.
            ValueError: no rows, labels or weights that are missing, of another length or out of range, options that
                need ``validation`` or ``checkpoint`` without it, a schedule that ends too soon, an unknown metric, a
                module that cannot be scored in train mode, or a checkpoint that is damaged, of other settings, of
                another model or of more epochs; or the model has a ``process_group`` of several ranks.
            OSError: no file can be written where ``checkpoint`` is to be, before anything is trained.
            ImportError: a package that ``metrics`` or ``progress=True`` needs.
            FloatingPointError: the loss is not finite, or the score is infinite.
        """
        epochs = check_count("epochs", epochs)
        batch_size = None if batch_size is None else check_count("batch_size", batch_size)
        patience = None if patience is None else check_count("patience", patience)
        if validation is None and not (score is None and patience is None and metrics is None):
            raise ValueError("score, patience, metrics: expected validation=0.1 or (data, labels) with them, got none")
        if not (score is None or isinstance(score, str) or callable(score)):
            raise TypeError(f"score: expected a function or a name, got {shown(score)}")
        if schedule is None and schedule_every != "epoch":
            raise ValueError("schedule_every: expected schedule= with it, got none")
        checkpoint_every = None if checkpoint_every is None else check_count("checkpoint_every", checkpoint_every)
        resume = check_flag("resume", resume)
        if checkpoint is None and (checkpoint_every is not None or resume):
            raise ValueError("checkpoint_every, resume: expected checkpoint='checkpoint.pt' with them, got none")
        check_ranks(self.joint_loss)
        if checkpoint is not None:
            check_place(checkpoint)
        called, shown_by = Callbacks(callbacks), reporter(progress)
        seed = check_seed(seed)
        # It trains whatever mode it is called in. Not as decorators, whose frames warnings would point at.
        self.encoder().warn_anew()
        with torch.inference_mode(False), torch.enable_grad():
            rows, held = with_validation(self, rows_of(self, data, labels, sample_weight, "labels"), validation, seed)
            needs_scale = any(task.standardise for task in self.tasks)
            for parts, times in ((rows, epochs + needs_scale), (held, 2)):
                if isinstance(parts, RowParts):
                    parts.check_times(times)
            scorer = None if held is None else Scorer(self, held, score, metrics, batch_size or BATCH_SIZE, patience)
            timing = {"schedule": schedule, "schedule_every": schedule_every}
            run = run_for(self._run, self, optimizer, embedding_optimizer, seed=seed, lr=lr, **timing)
            updates = Updates(run, clip_norm)
            if isinstance(rows, RowParts):  # what is wrong with their labels is found while they are read
                tasks = rows.measured_tasks()
            else:
                tasks = measured_tasks(self.tasks, rows.labels.targets)
                warn_of_unlabelled(self.joint_loss, rows.labels.targets, "labels", UNTRAINED)
                warn_of_scale(tasks, rows.labels.targets)
            if scorer is not None:
                effect = "the default score leaves them out"
                warn_of_unlabelled(self.joint_loss, scorer.targets, "validation labels", effect)
            warn_of_large_tables(self.embedding, rows_at_once(rows, batch_size))
            if not is_training(self):
                warn_caller(
                    "fit: the whole model is in eval mode, and is trained in it: dropout is off, and statistics of "
                    "batch norm stand still; call model.train() first if that is not wanted"
                )
            self._run, self.tasks = run, tasks
            with shown_by as shows:
                trainer = Trainer(
                    self,
                    rows,
                    updates,
                    epochs=epochs,
                    batch_size=batch_size,
                    scorer=scorer,
                    callbacks=called,
                    reporter=shows,
                    checkpoint=checkpoint,
                    checkpoint_every=checkpoint_every,
                )
                return trainer.train(resume=resume)

    def evaluate(
        self,
        data: Table | Encoded | Parts,
        labels: Table | None = None,
        *,
        metrics: Metrics = None,
        sample_weight: SampleWeight = None,
        batch_size: int = 8192,
    ) -> Evaluation:
        """Losses and metrics over data with labels: the numbers that ``fit`` gives of validation data.

        In eval mode, as :meth:`predict` is.

        Args:
            data, labels, metrics, sample_weight: see :meth:`fit`.

        Returns:
            ``loss`` (the joint loss), and for each task ``loss``, ``count`` and ``metrics``: ``found["click"]["auc"]``.
            A loss or metric of no label is None.

        Raises:
            TypeError, ValueError, ImportError: see :meth:`fit`; or labels that ``standardise=True`` has not measured.
        """
        batch_size = check_count("batch_size", batch_size)
        self.encoder().warn_anew()
        rows = rows_of(self, data, labels, sample_weight, "labels")
        if isinstance(rows, Rows):
            wanted = checked_metrics(self, rows.labels, metrics)
        else:
            wanted = metrics_by_task(metrics, self.tasks)
        found, _, read = evaluation(self, rows.blocks(batch_size), wanted)
        if isinstance(rows, RowParts):  # whose weights nobody has seen before
            warn_of_unweighted(read, wanted)
        return found

    def predict(self, data: Table | Encoded, *, batch_size: int = 8192) -> dict[str, Array]:
        """Predictions by task, float32: probabilities ``(N,)``, values ``(N,)``, or class probabilities ``(N, C)``.

        Values are in the scale of the labels, also where a regression is standardised.

        In eval mode and without autograd, and no module's mode is touched: any number of threads may share the model,
        also while it is trained. Where a module is in train mode, a view of the model is read that shares its tensors:
        compiled parts run uncompiled there, and attributes that a ``forward`` sets on its module do not reach the
        model. For serving call ``model.eval()`` once.

        Raises:
            TypeError, ValueError: see :meth:`encode`; or a part in train mode that only ``model.eval()`` can bring into
                eval mode; or a task whose ``standardise=True`` has measured no labels yet.
        """
        batch_size = check_count("batch_size", batch_size)
        return predictions(self, data, batch_size)

    def gate_weights(self, data: Table | Encoded, *, batch_size: int = 8192) -> list[list[Tensor]]:
        """The weights of every gate, per level and mixture ``(N, |A(o)|)``, on the CPU.

        ``ple_fast.viz.gate_use(model.gate_weights(data), model.topologies, model.task_names)`` sums them up.

        In eval mode, as :meth:`predict` is.

        Raises:
            TypeError: the trunk is a module of the user's without ``return_gates``.
        """
        batch_size = check_count("batch_size", batch_size)
        _ = self.topologies  # says what is wrong with a trunk that has no gates
        return gate_weights(self, data, batch_size)

    @torch.inference_mode(False)  # or nobody could export what it returns
    def for_inference(self, *, plain: bool = False) -> ServedModel:
        """A module for deployment, in eval mode: ``served(*model.encode(data))`` is :meth:`predict` on tensors.

        ``torch.export``, ``torch.compile``, AOTInductor, the exporters to ONNX and ``torch.jit.trace`` take it, for any
        number of rows. Weights are copies, batch norm is part of linear layers where it can be, and nothing requires a
        gradient: the model can train on.

        Args:
            plain: run, trace and export PyTorch's own operators, on a GPU too, whatever ``use_backend`` says.

        Raises:
            TypeError, ValueError: a norm cannot be served; the message names it.
            ValueError: a task whose ``standardise=True`` has measured no labels yet.
        """
        return ServedModel(self, plain=plain)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin a training of their own: an optimizer may hold what cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "_run"}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Called for each module that a state is loaded into: what ``fit`` kept is of other weights."""
        self._run = None
        super()._load_from_state_dict(*arguments)

    def save(self, directory: str | Path) -> None:
        """Writes one file, ``model.safetensors``, into a directory; the configuration stands in it.

        It replaces the model that is there in one step: an interruption or a crash leaves either of the two, whole, and
        whoever loads meanwhile gets one of them. Any number of threads and processes may save there; the last one
        stays. Weights that a parametrisation or pruning computes are saved as values, tied ones each by itself, and
        compiled parts as they were before. A trunk of the user's own is not described: :meth:`load` then wants it.

        Raises:
            ValueError: the model has been changed so that :meth:`load` could not build it again.
        """
        config = {
            "dtype": str(next(self.towers.parameters()).dtype).removeprefix("torch."),
            "columns": [to_json(column) for column in self.columns],
            "tasks": [task_to_json(task) for task in self.tasks],
            **self._config,
            **({"sparse_embeddings": True} if getattr(self.embedding, "sparse", False) else {}),
        }
        storage.write(*saved_form(self, config), directory)

    @classmethod
    @torch.inference_mode(False)  # or nothing could train what it returns
    def load(
        cls,
        directory: str | Path,
        *,
        trunk: nn.Module | Callable[[int], nn.Module] | None = None,
        device: torch.device | str = "cpu",
    ) -> MultiTaskModel:
        """The model that :meth:`save` wrote, in eval mode, each weight in its dtype. Nothing is unpickled.

        Args:
            trunk: for a model with a trunk of the user's own, and only then: such a module, or a function that makes
                it.
            device: where the model goes.

        Raises:
            FileNotFoundError: there is no model.
            ValueError: a file that is damaged, of another kind or version; a trunk that is missing, not wanted, or of
                another class.
        """
        saved = storage.read(directory)
        return rebuilt(cls, saved.where, saved.config, saved.state, trunk).to(device).eval()
