// The operators, by the names under which Python finds them.
#include <optional>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace specgen {

Tensor pack_weight(const Tensor& weight);
Tensor linear(const Tensor& x, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
              std::vector<int64_t> outputs);
Tensor bmm(const Tensor& x, const Tensor& weight);
Tensor tree_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys,
                      const Tensor& values, const Tensor& plan, double scale, double softcap,
                      const std::optional<Tensor>& sinks, int64_t window, int64_t chunk);
std::tuple<Tensor, Tensor> top_tokens(const Tensor& logits, int64_t count);
void segmented_lora(Tensor y, const Tensor& x, std::vector<int64_t> bounds, std::vector<Tensor> downs,
                    std::vector<Tensor> ups);

}  // namespace specgen

STABLE_TORCH_LIBRARY(specgen, library) {
  library.def("pack_weight(Tensor weight) -> Tensor");
  library.def("linear(Tensor x, Tensor[] weights, Tensor?[] biases, int[] outputs) -> Tensor");
  library.def("bmm(Tensor x, Tensor weight) -> Tensor");
  library.def(
      "tree_attention(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, Tensor plan, float scale, "
      "float softcap, Tensor? sinks, int window, int chunk) -> Tensor");
  library.def("top_tokens(Tensor logits, int count) -> (Tensor, Tensor)");
  library.def("segmented_lora(Tensor(a!) y, Tensor x, int[] bounds, Tensor[] downs, Tensor[] ups) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(specgen, CPU, library) {
  library.impl("pack_weight", TORCH_BOX(&specgen::pack_weight));
  library.impl("linear", TORCH_BOX(&specgen::linear));
  library.impl("bmm", TORCH_BOX(&specgen::bmm));
  library.impl("tree_attention", TORCH_BOX(&specgen::tree_attention));
  library.impl("top_tokens", TORCH_BOX(&specgen::top_tokens));
  library.impl("segmented_lora", TORCH_BOX(&specgen::segmented_lora));
}
