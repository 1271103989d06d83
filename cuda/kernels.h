// The operations of the CUDA backend, one function per entry of lemo::Backend. Arguments arrive validated.
#pragma once

#include "src/backend.h"

namespace lemo::cuda {

void select(const lemo_exec& exec, const lemo_select_args& a);
void scores(const lemo_exec& exec, const lemo_scores_args& a);
void predict(const lemo_exec& exec, const lemo_predict_args& a);
void gather(const lemo_exec& exec, const lemo_gather_args& a);
void scatter_add(const lemo_exec& exec, const lemo_scatter_add_args& a);
void gather_norm(const lemo_exec& exec, const lemo_gather_norm_args& a);
void gather_norm_backward(const lemo_exec& exec, const lemo_gather_norm_backward_args& a);
void attention_forward(const lemo_exec& exec, const lemo_attention_forward_args& a);
void attention_backward(const lemo_exec& exec, const lemo_attention_backward_args& a);
void linear_cross_entropy(const lemo_exec& exec, const lemo_linear_cross_entropy_args& a);

uint64_t select_workspace(const lemo_exec& exec, const lemo_select_args& a);
uint64_t scores_workspace(const lemo_exec& exec, const lemo_scores_args& a);
uint64_t predict_workspace(const lemo_exec& exec, const lemo_predict_args& a);
uint64_t gather_norm_backward_workspace(const lemo_exec& exec, const lemo_gather_norm_backward_args& a);
uint64_t attention_forward_workspace(const lemo_exec& exec, const lemo_attention_forward_args& a);
uint64_t attention_backward_workspace(const lemo_exec& exec, const lemo_attention_backward_args& a);
uint64_t linear_cross_entropy_workspace(const lemo_exec& exec, const lemo_linear_cross_entropy_args& a);

}  // namespace lemo::cuda
