"""The network of ``network.py`` with what is done to it: trained, read, saved and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..scalars import check_count, shown
from . import storage
from .arguments import label_tensors, warn_of_unlabelled
from .columns import Encoded, to_json
from .eval_view import is_training
from .evaluation import gate_weights, predictions
from .network import TaskNetwork
from .rebuild import rebuilt, saved_form
from .run import Run, run_for
from .scoring import Score, Scorer
from .tables import Array, Table
from .training import EpochResult, Progress, progress_bar, train


class MultiTaskModel(TaskNetwork):
    """Embeddings of a table's columns, a trunk, one tower (MLP) per task, and their joint loss.

    Initial weights come from PyTorch's global generator: call ``torch.manual_seed`` before.

    Args:
        columns: :class:`Categorical`, :class:`Hashed` and :class:`Numeric`; :func:`columns_from` makes them of training
            data.
        tasks: :class:`~ple_fast.losses.TaskLoss`, names unique.
        trunk: ``"ple"``, ``"cgc"``, ``"mmoe"``, ``"ml_mmoe"``, ``"adatt"``, ``"cross_stitch"``, ``"hard_sharing"``,
            ``"customized_sharing"``, ``"asymmetric_sharing"`` or ``"single_task"``; a module, or a function that takes
            ``in_features`` and returns one, from ``(B, in_features)`` to ``(B, T, H)``.
        trunk_options: keywords of the named trunk's class (``PLE``, ``CGC``, ...), of values that JSON can hold.
        tower_units: widths of each tower's hidden layers, in front of its output.
        tower_activation: one of relu, leaky_relu, prelu, gelu, silu, tanh, sigmoid.
        tower_dropout: behind each hidden layer of the towers.
        given: for events in a chain (ESMM): ``{"purchase": "click"}`` says that the tower of "purchase" predicts the
            probability given a click, and that the task's output is the product with that of "click". Both are binary,
            and the condition stands before in ``tasks``.
        process_group: see :class:`~ple_fast.losses.JointLoss`.

    Raises:
        TypeError: an argument of another type, or an option that the trunk does not have.
        ValueError: a column or task twice, an unknown trunk or activation, a trunk that does not return ``(B, T, H)``.
    """

    _run: Run | None = None
    """What the last call of ``fit`` hands on to the next."""

    def fit(
        self,
        data: Table | Encoded,
        labels: Table,
        *,
        epochs: int = 1,
        batch_size: int = 1024,
        lr: float = 1e-3,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        validation: tuple[Table | Encoded, Table] | None = None,
        score: Score | None = None,
        patience: int | None = None,
        seed: int = 0,
        progress: bool | Progress | None = None,
    ) -> list[EpochResult]:
        """Trains on all rows of ``data``, in an order of its own generator.

        Every module stays in the mode it is in: of what ``eval()`` was called on before, dropout is off and batch norm
        keeps its statistics.

        A later call goes on where the last one ended, with the next order of the rows and the optimizer with its state:
        three calls with ``epochs=1`` are one with ``epochs=3``. Another ``seed``, ``lr`` or ``optimizer`` (another
        function; a ``functools.partial`` is the same if its parts are equal), other trainable parameters (or elsewhere,
        or of another dtype) and ``load_state_dict`` begin anew. The optimizer alone is a new one after a call that
        raised, or that put the weights of an earlier epoch back, because its state is not that of the weights. The
        state stays in memory with the model, and is no part of its copies, pickles and files.

        Args:
            data: columns by name, or what :meth:`encode` made of them.
            labels: by task, ``(N,)``; NaN where a label is missing (multiclass: also -1).
            epochs, batch_size, lr: the last batch is smaller; a single row left over joins the batch before.
            optimizer: called as ``optimizer(parameters, lr=lr)``; ``functools.partial`` sets more.
            validation: data and labels that are scored after each epoch, in eval mode. The weights of this call's best
                epoch are restored at the end, also when training is interrupted.
            score: of the predictions (see :meth:`predict`) and the validation labels, higher is better; default: minus
                the joint loss.
            patience: stop after so many epochs without a better score.
            seed: of the order of the rows.
            progress: True for a progress bar (needs rich), or a function that is called with a ``Step`` after each
                batch.

        Returns:
            One result per epoch that ran. An exception that ends the training, such as Ctrl-C's KeyboardInterrupt, has
            them as ``error.history``.

        Warns:
            UserWarning: the whole model is in eval mode; a task has no label in ``labels``, or none in the validation
                labels (where no task has any, the default score is None, and nothing is stopped or restored by it).

        Raises:
            TypeError: an argument of another type.
            ValueError: no rows, labels that are missing, of another length or out of range, options that need
                ``validation`` without it, or a module that cannot be scored in train mode.
            FloatingPointError: the loss or the score is not finite.
        """
        epochs, batch_size = check_count("epochs", epochs), check_count("batch_size", batch_size)
        patience = None if patience is None else check_count("patience", patience)
        if validation is None and (score is not None or patience is not None):
            raise ValueError("score, patience: expected validation=(data, labels) with them, got none")
        for name, function in (("score", score), ("progress", progress)):
            if not (function is None or callable(function) or (name == "progress" and isinstance(function, bool))):
                raise TypeError(f"{name}: expected a function, got {shown(function)}")
        # It trains whatever mode it is called in. Not as decorators, whose frames warnings would point at.
        with torch.inference_mode(False), torch.enable_grad():
            rows = self.encode(data)
            targets = label_tensors(labels, len(rows), self.joint_loss, "labels")
            scorer = None if validation is None else Scorer(self, self.predict, validation, score, batch_size, patience)
            run = run_for(self._run, seed=seed, lr=lr, optimizer=optimizer, parameters=self.parameters())
            warn_of_unlabelled(self.joint_loss, targets, "labels", "they are not trained")
            if scorer is not None:
                effect = "the default score leaves them out"
                warn_of_unlabelled(self.joint_loss, scorer.targets, "validation labels", effect)
            if not is_training(self):
                warnings.warn(
                    "fit: the whole model is in eval mode, and is trained in it: dropout is off, and statistics of "
                    "batch norm stand still; call model.train() first if that is not wanted",
                    stacklevel=2,
                )
            self._run = run
            with progress_bar(progress) as report:
                return train(
                    self, rows, targets, run, epochs=epochs, batch_size=batch_size, score=scorer, progress=report
                )

    def predict(self, data: Table | Encoded, *, batch_size: int = 8192) -> dict[str, Array]:
        """Predictions by task, float32: probabilities ``(N,)``, values ``(N,)``, or class probabilities ``(N, C)``.

        In eval mode and without autograd, and no module's mode is touched: any number of threads may share the model,
        also while it is trained. Where a module is in train mode, a view of the model is read that shares its tensors:
        compiled parts run uncompiled there, and attributes that a ``forward`` sets on its module do not reach the
        model. For serving call ``model.eval()`` once.

        Raises:
            TypeError, ValueError: see :meth:`encode`; or a part in train mode that only ``model.eval()`` can bring into
                eval mode.
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
            "tasks": [asdict(task) for task in self.tasks],
            **self._config,
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
