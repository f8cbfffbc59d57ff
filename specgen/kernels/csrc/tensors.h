// What the kernels need of torch, through its stable interface: one build serves any torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "partition.h"

namespace specgen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class F>
void in_parallel(int64_t count, const F& work) {
  torch::stable::parallel_for(0, count, 1, work);
}

}  // namespace specgen
