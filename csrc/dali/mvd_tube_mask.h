// fn.mvd_tube_mask: sample numbers -> tube mask, inside a DALI pipeline.
#pragma once

#include <string>
#include <vector>

#include "dali/core/tensor_shape.h"
#include "dali/pipeline/operator/operator.h"

namespace mvd {

// What both backends share: arguments, checks and the output's shape.
template <typename Backend>
class DaliTubeMask : public dali::Operator<Backend> {
 public:
  explicit DaliTubeMask(const dali::OpSpec& spec)
      : dali::Operator<Backend>(spec),
        grid_(spec.GetRepeatedArgument<int>("grid")),
        masked_(spec.GetArgument<int>("masked")) {
    DALI_ENFORCE(grid_.size() == 3 && grid_[0] > 0 && grid_[1] > 0 && grid_[2] > 0,
                 "mvd_tube_mask: grid must be three positive integers (time, height, width)");
    DALI_ENFORCE(0 <= masked_ && masked_ <= positions(),
                 "mvd_tube_mask: masked is " + std::to_string(masked_) + ", it must be between 0 and the " +
                     std::to_string(positions()) + " positions of a slice");
  }

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& outputs, const dali::Workspace& ws) override {
    const auto& numbers = ws.Input<Backend>(0);
    DALI_ENFORCE(numbers.type() == DALI_INT64, "mvd_tube_mask: its input must be int64");
    for (int i = 0; i < numbers.num_samples(); ++i)
      DALI_ENFORCE(numbers.shape()[i] == dali::TensorShape<>({3}),
                   "mvd_tube_mask: each input sample must be three numbers: seed, epoch, sample");
    outputs.resize(1);
    outputs[0].type = DALI_BOOL;
    outputs[0].shape = dali::uniform_list_shape(numbers.num_samples(), dali::TensorShape<1>{slices() * positions()});
    return true;
  }

  int64_t slices() const { return grid_[0]; }
  int64_t positions() const { return static_cast<int64_t>(grid_[1]) * grid_[2]; }
  int64_t masked() const { return masked_; }

 private:
  const std::vector<int> grid_;
  const int64_t masked_;
};

}  // namespace mvd
