"""The elastic hybrid model, and its registration with Megatron's hybrid model builder."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig
from torch import Tensor

from megatron_elastic import metadata as family_metadata
from megatron_elastic.backend import LOCAL
from megatron_elastic.budget import Selection
from megatron_elastic.curriculum import FORWARD_KL, DistillationLoss
from megatron_elastic.errors import CheckpointError
from megatron_elastic.family import Family
from megatron_elastic.layers.linear import ElasticLMHead, TeacherTarget, TopKTarget
from megatron_elastic.layers.moe_role import MoeRole
from megatron_elastic.layers.packing import documents_of_any
from megatron_elastic.metadata import ROUTER_PREFIX, Metadata
from megatron_elastic.precision import Precision
from megatron_elastic.router import RouterTrainer
from megatron_elastic.specs import elastic_stack_spec


class FamilyState:
    """What a family has besides weights: its description and, while one exists, its router. Saved with the model."""

    def __init__(self, metadata: Metadata, trainer: RouterTrainer | None) -> None:
        self.metadata = metadata
        self.trainer = trainer
        self.loaded = False

    def update(self, **values: Any) -> None:
        """Replaces fields of the metadata."""
        self.metadata = replace(self.metadata, **values)

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors to save, by checkpoint key."""
        found = {family_metadata.KEY: self.metadata.to_tensor()}
        if self.trainer is not None:
            found.update({ROUTER_PREFIX + name: tensor for name, tensor in self.trainer.tensors().items()})
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what a checkpoint holds.

        Raises:
            CheckpointError: the checkpoint has no description, no router, or is another family's.
        """
        own = self.tensors()
        missing = sorted(set(own) - set(tensors))
        if missing:
            raise CheckpointError(f"not a family of this recipe: {missing[:3]} missing; load a family checkpoint")
        found = Metadata.from_tensor(tensors[family_metadata.KEY])
        different = self.metadata.same_family(found)
        if different:
            raise CheckpointError("the checkpoint is another family: " + "; ".join(different))
        self.update(selections=found.selections, iteration=found.iteration)
        with torch.no_grad():
            for name, tensor in own.items():
                if name != family_metadata.KEY:
                    tensor.copy_(tensors[name])
        self.loaded = True


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is scaled: a replicated use counts once, not once a tensor-parallel rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.factor, None


class _Tie(torch.autograd.Function):
    """The teacher's output with a zero gradient for the tensor this stage received.

    Core's backward skips a tensor without gradient, and the previous stage would then wait forever. The output is never
    a view (the schedule frees its storage), and never `0 * x` (an infinity would become NaN).
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, received: Tensor) -> Tensor:
        ctx.like = received.shape, received.dtype, received.device
        result = output.new_empty(1)
        result.data = output
        return result

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        shape, dtype, device = ctx.like
        return None, torch.zeros(shape, dtype=dtype, device=device)


class ElasticHybridModel(HybridModel):
    """`HybridModel` that runs the parent, any soft selection of it, or any slice of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In tuples, not as submodules: neither is saved by name, hooked by DDP, optimized or put into train mode.
        self.teachers: tuple[ElasticHybridModel, ...] = ()
        self.states: tuple[FamilyState, ...] = ()
        if self.post_process:
            self.output_layer = ElasticLMHead(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=not self.parallel_output,
                tp_group=self.pg_collection.tp,
            )
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hands the received tensor to this stage, and to the teacher's."""
        super().set_input_tensor(input_tensor)
        for teacher in self.teachers:
            teacher.set_input_tensor(input_tensor)

    def trunk(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        selection: Selection | None = None,
        probabilities: Mapping[str, Tensor] | None = None,
        documents: Tensor | None = None,
        moe: MoeRole | None = None,
    ) -> Tensor:
        """Everything but the LM head: tokens `[b, s]` -> `[s, b, kept hidden]` (`[s / TP, ...]` with SP)."""
        x = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        rotary = None
        if self.position_embedding_type == "rope":
            length = self.rotary_pos_emb.get_rotary_seq_len(None, self.decoder, x, self.config, None)
            rotary = self.rotary_pos_emb(length)
        tp_size = self.pg_collection.tp.size()
        if probabilities is not None and tp_size > 1 and not self.config.sequence_parallel:
            # Masks of the residual stream, which every rank of the group holds whole.
            scaled = {axis: _ScaleGradient.apply(probabilities[axis], 1.0 / tp_size) for axis in ("hidden", "depth")}
            probabilities = {**probabilities, **scaled}
        output: Tensor = self.decoder(
            x, rotary, selection=selection, probabilities=probabilities, documents=documents, moe=moe
        )
        return output

    def _head_segments(self, selection: Selection | None) -> Any:
        return None if selection is None else self.decoder.plans.of(selection).segments["output_layer.weight"]

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        selection: Selection | None = None,
        probabilities: Mapping[str, Tensor] | None = None,
        run_teacher: bool = False,
        live_teacher: bool = False,
        cached_teacher: bool = False,
        teacher: TeacherTarget | TopKTarget | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        temperature: float = 1.0,
        loss: DistillationLoss = FORWARD_KL,
        documents: Tensor | None = None,
        moe: MoeRole | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """One microbatch in one role.

        With context parallelism `s` is this rank's share of the sequence: slices `r` and `2 * CP - 1 - r` of `2 * CP`,
        as core's `get_batch_on_this_cp_rank` cuts it, and losses are sums over this rank's tokens.

        Args:
            input_ids: `[b, s]`.
            position_ids: `[b, s]`.
            attention_mask: refused; attention is causal.
            selection: runs the slice of this selection.
            probabilities: axis -> `[uses, choices]` fp32: runs under soft masks. By keyword, so that mixed precision
                leaves it be.
            run_teacher: runs the frozen teacher instead and returns its final hidden states.
            live_teacher: with `run_teacher`: the parent as it is now is the teacher.
            cached_teacher: with `run_teacher`: nothing is run, what the teacher says is read from a cache; what is
                returned has the shape of hidden states and says nothing.
            teacher: on the last stage, returns the summed KD loss against it.
            labels: `[b, s]`: on the last stage and without `teacher`, returns the summed cross entropy; with it, for
                the cross entropy that `loss` adds.
            loss_mask: `[b, s]`, required for a loss.
            temperature: of the KD softmax.
            loss: divergence from the teacher, and the weight of the cross entropy.
            documents: number of each token's document, `[b, s * CP]`, of the whole sequence in the order of the text
                and not decreasing: no token sees another document. The same on every rank and stage. None: a row is one
                document.
            moe: part of this microbatch in the balance of experts; None in evaluation.
            packed_seq_params: the same in Megatron's terms; not together with `documents`.

        Returns:
            Hidden states `[s, b, h]` before the last stage and for the teacher; on the last stage the 0-dim loss sum,
            or the logits `[b, s, V / TP]` where neither `teacher` nor `labels` is given.
        """
        if attention_mask is not None:
            raise ValueError(
                "attention_mask: elastic attention is causal; pass None (--no-create-attention-mask-in-dataloader)"
            )
        if packed_seq_params is not None:
            if documents is not None:
                raise ValueError("documents and packed_seq_params say the same: pass one of the two")
            tokens = input_ids.size(1) * self.pg_collection.cp.size()
            documents = documents_of_any(packed_seq_params, input_ids.size(0), tokens)
        if run_teacher and cached_teacher:
            return self._empty_turn(input_ids)
        if run_teacher:
            teaching = self if live_teacher else self._frozen_teacher()
            return self._teacher_forward(teaching, input_ids, position_ids, documents)
        hidden = self.trunk(
            input_ids,
            position_ids,
            selection=selection,
            probabilities=probabilities,
            documents=documents,
            moe=moe,
        )
        if not self.post_process:
            return hidden
        output, _ = self.output_layer(
            hidden,
            segments=self._head_segments(selection),
            teacher=teacher,
            labels=labels,
            token_weights=loss_mask,
            temperature=temperature,
            loss=loss,
        )
        if teacher is None and labels is None:
            return output.transpose(0, 1).contiguous()
        result: Tensor = output
        return result

    def _frozen_teacher(self) -> "ElasticHybridModel":
        if not self.teachers:
            raise ValueError("run_teacher: this model has no teacher")
        return self.teachers[0]

    def _teacher_forward(
        self, teaching: "ElasticHybridModel", input_ids: Tensor, position_ids: Tensor, documents: Tensor | None
    ) -> Tensor:
        received = None if self.pre_process else self.decoder.input_tensor
        with torch.no_grad():
            hidden = teaching.trunk(input_ids, position_ids, documents=documents)
        if received is None or not received.requires_grad:
            return hidden
        return _Tie.apply(hidden, received)  # type: ignore[no-any-return]

    def _empty_turn(self, input_ids: Tensor) -> Tensor:
        """What this stage hands on in the turn of a teacher that is not run."""
        received = None if self.pre_process else self.decoder.input_tensor
        batch, tokens = input_ids.shape
        tokens //= self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        dtype = self.config.pipeline_dtype or self.config.params_dtype
        empty = torch.zeros(tokens, batch, self.config.hidden_size, dtype=dtype, device=input_ids.device)
        if received is None or not received.requires_grad:
            return empty
        return _Tie.apply(empty, received)  # type: ignore[no-any-return]

    def top_k_target(self, hidden: Tensor, k: int, temperature: float) -> TopKTarget:
        """The same of the frozen teacher's `k` most probable tokens alone."""
        target: TopKTarget = self._frozen_teacher().output_layer.top_k_target(hidden.detach(), k, temperature)
        return target

    def teacher_target(self, hidden: Tensor, live: bool = False) -> TeacherTarget:
        """What the students of a batch are compared with: the teacher's final hidden states and its LM head."""
        # In mixed precision core hands on what the last stage returns in fp32: it was in the head's type, and is again.
        hidden = hidden.detach().to(self.output_layer.weight.dtype)
        # The live teacher's head is read where its owner runs: elsewhere it may be stale.
        return TeacherTarget(hidden, None if live else self._frozen_teacher().output_layer.weight.detach())

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Adds the family's state under keys that do not depend on the layout (first model chunk only)."""
        found: dict[str, Any] = super().sharded_state_dict(*args, **kwargs)
        groups = self.pg_collection
        replica = groups.pp.rank(), groups.tp.rank(), groups.dp_cp.rank()
        for state in self.states:
            for key, tensor in state.tensors().items():
                # A copy: an asynchronous save reads host memory (AdamW's step counts) while training goes on.
                found[key] = ShardedTensor.from_rank_offsets(key, tensor.clone(), replica_id=replica)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any) -> Any:
        """Takes the family's state out of the state dict and loads the rest as core does."""
        own = {key: state_dict[key] for key in state_dict if key.startswith("elastic.")}
        for state in self.states:
            state.load(own)
        rest = {key: value for key, value in state_dict.items() if key not in own}
        return super().load_state_dict(rest, strict=strict, **kwargs)


@dataclass(kw_only=True)
class ElasticModelConfig(HybridModelConfig):
    """`HybridModelConfig` whose builder is ours.

    Attributes:
        family: what is elastic.
        backend: of its layers, one of `backend.BACKENDS`.
        precision: FP8 of the local backend's linear layers; Transformer Engine reads Megatron's own config.
        on_build: called with each model chunk and its virtual stage before it is wrapped (loads weights, adds a
            teacher).
    """

    builder: ClassVar[str] = "megatron_elastic.model.ElasticModelBuilder"
    family: Family | None = None
    backend: str = LOCAL
    precision: Precision | None = None
    on_build: Callable[["ElasticModelBuilder", ElasticHybridModel, ProcessGroupCollection, int | None], None] | None = (
        None
    )


class ElasticModelBuilder(HybridModelBuilder):
    """Builds `ElasticHybridModel` where core's builder builds `HybridModel`."""

    def build_plain(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
        *,
        quantised: bool = True,
    ) -> ElasticHybridModel:
        """One model chunk with initial weights, and nothing attached; without the run's FP8 where not `quantised`."""
        settings = self._model_config
        assert settings.family is not None
        config = settings.transformer
        if not quantised:
            config = copy.copy(config)
            config.fp8 = None
        return ElasticHybridModel(
            config=config,
            hybrid_stack_spec=elastic_stack_spec(
                settings.family, settings.backend, settings.precision if quantised else None
            ),
            vocab_size=settings.family.shape.vocab,
            max_sequence_length=settings.seq_length,
            hybrid_layer_pattern=settings.hybrid_layer_pattern,
            parallel_output=True,
            share_embeddings_and_output_weights=False,
            position_embedding_type=settings.position_embedding_type,
            rotary_percent=settings.rotary_percent,
            rotary_base=settings.rotary_base,
            pre_process=is_pp_first_stage(pg_collection.pp) if pre_process is None else pre_process,
            post_process=is_pp_last_stage(pg_collection.pp) if post_process is None else post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> ElasticHybridModel:
        """One model chunk, finished by the config's `on_build`."""
        model = self.build_plain(pg_collection, pre_process, post_process, vp_stage)
        if self._model_config.on_build is not None:
            self._model_config.on_build(self, model, pg_collection, vp_stage)
        return model
