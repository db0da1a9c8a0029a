// A device that keeps its memory on the host: PyTorch's PrivateUse1 backend, with the rules of a real accelerator.
//
// A tensor of this device is ordinary memory under another dispatch key.  Every operator that the device does not
// define reaches `run_on_host`, which shows the same bytes to PyTorch's CPU kernels and claims the results back,
// without a copy either way.  What a real device refuses is refused here: tensors of two devices in one operator and,
// while a compiled graph runs, whatever the host would have to wait for or whose shape depends on the data.
//
// Nothing of Python is used: `torch.ops.load_library` loads this file and ctypes reads the counters at its end.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using at::Tensor;
using c10::IValue;
using Stack = std::vector<IValue>;

const c10::Device kHere(c10::DeviceType::PrivateUse1, 0);

std::string name_of_device() { return c10::get_privateuse1_backend(); }

// ---------------------------------------------------------------------------------------------------- accounting

struct Accounts {
  std::atomic<int64_t> in_use{0}, peak{0}, limit{INT64_MAX}, allocations{0};
  std::atomic<int64_t> fail_over{-1};  // the next allocation of more bytes than this fails, once; -1: none does
  std::atomic<int64_t> to_host{0}, to_host_bytes{0}, from_host{0}, from_host_bytes{0};
  std::mutex guard;  // of the two maps
  std::map<std::string, int64_t> eager, in_graph;
};

Accounts accounts;
thread_local int graphs_running = 0;  // a graph runs on one thread: nesting, not concurrency

void take(size_t bytes) {
  int64_t over = accounts.fail_over.load();
  if (over >= 0 && static_cast<int64_t>(bytes) > over && accounts.fail_over.compare_exchange_strong(over, -1)) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, name_of_device(), " out of memory: an allocation of ", bytes,
                     " bytes failed, as it was told to");
  }
  const int64_t now = accounts.in_use += bytes;
  if (now > accounts.limit) {
    accounts.in_use -= bytes;
    TORCH_CHECK_WITH(OutOfMemoryError, false, name_of_device(), " out of memory: tried to allocate ", bytes,
                     " bytes; ", now - static_cast<int64_t>(bytes), " of ", accounts.limit.load(), " are in use");
  }
  accounts.allocations += 1;
  int64_t seen = accounts.peak;
  while (now > seen && !accounts.peak.compare_exchange_weak(seen, now)) {
  }
}

void give_back(size_t bytes) { accounts.in_use -= bytes; }

void count_to_host(int64_t bytes) {
  accounts.to_host += 1;
  accounts.to_host_bytes += bytes;
}

void count_op(const std::string& name) {
  std::lock_guard<std::mutex> lock(accounts.guard);
  (graphs_running > 0 ? accounts.in_graph : accounts.eager)[name] += 1;
}

// -------------------------------------------------------------------------------------------------------- memory

// What stands behind one storage of the device: the host memory, and its size for the accounts.
struct Block {
  explicit Block(c10::DataPtr memory, size_t bytes) : memory(std::move(memory)), bytes(bytes) {}
  explicit Block(c10::Storage host, size_t bytes) : host(std::move(host)), bytes(bytes) {}
  ~Block() { give_back(bytes); }
  c10::DataPtr memory;
  c10::Storage host;  // of a result that a CPU kernel allocated
  size_t bytes;
};

void free_block(void* block) {
  delete static_cast<Block*>(block);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, nullptr, &free_block, kHere};
    }
    take(bytes);
    auto* block = new Block(c10::GetCPUAllocator()->allocate(bytes), bytes);
    return {block->memory.get(), block, &free_block, kHere};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

DeviceAllocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return kHere; }
  c10::Device getDevice() const override { return kHere; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kHere); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kHere); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, kHere); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void resize_storage(const c10::Storage& storage, size_t bytes) {
  auto larger = allocator.allocate(bytes);
  const size_t kept = std::min(bytes, static_cast<size_t>(storage.nbytes()));
  if (kept > 0) {
    std::memcpy(larger.get(), storage.data(), kept);
  }
  auto* impl = storage.unsafeGetStorageImpl();
  impl->set_data_ptr(std::move(larger));
  impl->set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  // Of the host's side of a copy that does not block.
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};

Hooks hooks;
const bool hooks_are_registered = [] {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

// ------------------------------------------------------------------------------------- one memory, two identities

Tensor make(c10::Storage storage, c10::DispatchKey key, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// A CPU tensor over the same bytes.  It owns nothing: the device's tensor must outlive it.  A kernel that resizes it
// gives it memory of its own, which `keep_resized` hands to the device's tensor.
Tensor as_host(const Tensor& tensor) {
  const auto& storage = tensor.storage();
  c10::Storage view(c10::Storage::use_byte_size_t(), storage.nbytes(),
                    c10::DataPtr(const_cast<void*>(storage.data()), c10::Device(c10::kCPU)), c10::GetCPUAllocator(), true);
  return make(std::move(view), c10::DispatchKey::CPU, tensor);
}

// Device memory over what a CPU kernel allocated, which it keeps alive and accounts for.
c10::DataPtr claim_memory(const c10::Storage& host) {
  if (host.nbytes() == 0) {
    return allocator.allocate(0);
  }
  take(host.nbytes());
  return {const_cast<void*>(host.data()), new Block(host, host.nbytes()), &free_block, kHere};
}

c10::Storage claim(const c10::Storage& host) {
  return c10::Storage(c10::Storage::use_byte_size_t(), host.nbytes(), claim_memory(host), &allocator, true);
}

// After an operator that resized its `out` argument.
void keep_resized(const Tensor& tensor, const Tensor& host) {
  if (host.storage().data() != tensor.storage().data()) {
    auto* impl = tensor.storage().unsafeGetStorageImpl();
    impl->set_data_ptr(claim_memory(host.storage()));
    impl->set_nbytes(host.storage().nbytes());
  }
  if (host.sizes() != tensor.sizes() || host.strides() != tensor.strides()) {
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }
}

// -------------------------------------------------------------------------- operators that the device itself defines

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool /*non_blocking*/) {
  const int64_t bytes = from.numel() * from.element_size();
  if (from.is_cpu()) {
    // A host scalar is a constant that a compiler folds into its graph; anything larger is a transfer.
    TORCH_CHECK(graphs_running == 0 || from.dim() == 0, name_of_device(),
                ": a host to device copy inside a compiled graph; pass the tensor to the graph as an input");
    if (graphs_running == 0) {
      accounts.from_host += 1;
      accounts.from_host_bytes += bytes;
    }
  } else if (to.is_cpu()) {
    TORCH_CHECK(graphs_running == 0, name_of_device(),
                ": a device to host copy inside a compiled graph; return the tensor and copy it afterwards");
    count_to_host(bytes);
  } else {
    count_op("aten::copy_");
  }
  c10::InferenceMode host_only(true);
  auto source = from.is_cpu() ? from : as_host(from);
  auto target = to.is_cpu() ? to : as_host(to);
  target.copy_(source);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  const_cast<Tensor&>(to).resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& tensor) {
  TORCH_CHECK(graphs_running == 0, name_of_device(),
              ": item() inside a compiled graph: the host would have to wait for the device");
  count_to_host(tensor.element_size());
  return as_host(tensor).item();
}

Tensor& set_storage(Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef size,
                    at::IntArrayRef stride) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return tensor;
}

Tensor as_strided(const Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset.has_value() ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}

Tensor view(const Tensor& tensor, c10::SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return as_strided(tensor, size, stride, c10::SymInt(tensor.storage_offset()));
}

const Tensor& resize(const Tensor& tensor, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const int64_t bytes = (c10::multiply_integers(sizes) + tensor.storage_offset()) * tensor.element_size();
  if (static_cast<int64_t>(tensor.storage().nbytes()) < bytes) {
    resize_storage(tensor.storage(), bytes);
  }
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

// ---------------------------------------------------------------------------------------- every other operator

// The shape of what these return depends on the data, or the host reads it.
const std::set<std::string> data_dependent = {
    "aten::nonzero",    "aten::masked_select", "aten::equal",    "aten::_unique",
    "aten::_unique2",   "aten::unique_dim",    "aten::bincount", "aten::unique_consecutive",
    "aten::is_nonzero", "aten::unique_dim_consecutive",
};

class HostCall {
 public:
  HostCall(const c10::OperatorHandle& op, Stack& stack) : op_(op), name_(op.schema().name()), stack_(stack) {}

  void run() {
    count_op(name_);
    if (name_ == "aten::equal") {
      count_to_host(1);
    }
    refuse(data_dependent.count(name_) > 0 || repeats_by_data());
    const size_t given = op_.schema().arguments().size();
    for (size_t i = stack_.size() - given; i < stack_.size(); ++i) {
      stack_[i] = to_host(stack_[i]);
    }
    {
      c10::InferenceMode host_only(true);  // the host's views carry no gradients and no versions
      op_.callBoxed(stack_);
    }
    const size_t returned = op_.schema().returns().size();
    for (size_t i = stack_.size() - returned; i < stack_.size(); ++i) {
      stack_[i] = to_device(stack_[i]);
    }
  }

 private:
  void refuse(bool dependent) const {
    TORCH_CHECK(graphs_running == 0 || !dependent, name_of_device(), ": ", name_,
                " inside a compiled graph: its result's shape depends on the data");
  }

  bool repeats_by_data() const {
    if (name_ != "aten::repeat_interleave" || op_.schema().overload_name() != "Tensor") {
      return false;
    }
    return stack_.back().isNone();  // output_size was not given
  }

  Tensor to_host(const Tensor& tensor) {
    if (!tensor.defined()) {
      return tensor;
    }
    if (!tensor.is_privateuseone()) {
      TORCH_CHECK(tensor.dim() == 0, "Expected all tensors to be on the same device, but found at least two devices, ",
                  name_of_device(), ":0 and ", tensor.device(), "! (in ", name_, ")");
      return tensor;
    }
    const auto known = host_of_.find(tensor.unsafeGetTensorImpl());
    if (known != host_of_.end()) {
      return known->second;
    }
    auto host = as_host(tensor);
    host_of_.emplace(tensor.unsafeGetTensorImpl(), host);
    device_of_.emplace(host.unsafeGetTensorImpl(), tensor);
    if (tensor.storage().nbytes() > 0) {
      owner_.emplace(tensor.storage().data(), tensor);
    }
    return host;
  }

  IValue to_host(const IValue& value) {
    if (value.isTensor()) {
      return to_host(value.toTensor());
    }
    if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& tensor : value.toTensorVector()) {
        made.push_back(to_host(tensor));
      }
      return made;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> made;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList()) {
        if (!tensor.has_value() || !tensor->defined()) {
          made.push_back(std::nullopt);
          continue;
        }
        refuse(tensor->scalar_type() == at::kBool || tensor->scalar_type() == at::kByte);  // indexed by a mask
        made.push_back(to_host(*tensor));
      }
      return made;
    }
    if (value.isDevice()) {
      return c10::Device(c10::kCPU);
    }
    return value;
  }

  Tensor to_device(const Tensor& host) {
    if (!host.defined()) {
      return host;
    }
    const auto same = device_of_.find(host.unsafeGetTensorImpl());
    if (same != device_of_.end()) {
      keep_resized(same->second, host);
      return same->second;
    }
    const auto& storage = host.storage();
    const auto aliased = owner_.find(storage.data());
    if (storage.nbytes() > 0 && aliased != owner_.end()) {
      return make(aliased->second.storage(), c10::DispatchKey::PrivateUse1, host);
    }
    auto* key = storage.unsafeGetStorageImpl();
    auto claimed = claimed_.find(key);
    if (claimed == claimed_.end()) {
      claimed = claimed_.emplace(key, claim(storage)).first;
    }
    return make(claimed->second, c10::DispatchKey::PrivateUse1, host);
  }

  IValue to_device(const IValue& value) {
    if (value.isTensor()) {
      return to_device(value.toTensor());
    }
    if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& tensor : value.toTensorVector()) {
        made.push_back(to_device(tensor));
      }
      return made;
    }
    return value;
  }

  const c10::OperatorHandle& op_;
  const std::string& name_;
  Stack& stack_;
  std::unordered_map<c10::TensorImpl*, Tensor> host_of_, device_of_;
  std::unordered_map<const void*, Tensor> owner_;  // by the first byte of the storage
  std::unordered_map<c10::StorageImpl*, c10::Storage> claimed_;
};

void run_on_host(const c10::OperatorHandle& op, Stack* stack) {
  HostCall(op, *stack).run();
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("resize_", resize);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

std::string as_lines(const std::map<std::string, int64_t>& counts) {
  std::string lines;
  for (const auto& [name, count] : counts) {
    lines += name + " " + std::to_string(count) + "\n";
  }
  return lines;
}

}  // namespace

// ------------------------------------------------------------------------------------------- read through ctypes

extern "C" {

// In the order of `Reading` in device.py.
void fake_device_read(int64_t* out) {
  out[0] = accounts.in_use;
  out[1] = accounts.peak;
  out[2] = accounts.limit;
  out[3] = accounts.allocations;
  out[4] = accounts.to_host;
  out[5] = accounts.to_host_bytes;
  out[6] = accounts.from_host;
  out[7] = accounts.from_host_bytes;
}

// "name count" lines, valid until this thread's next call.
const char* fake_device_ops(int in_graphs) {
  static thread_local std::string lines;
  std::lock_guard<std::mutex> lock(accounts.guard);
  lines = as_lines(in_graphs ? accounts.in_graph : accounts.eager);
  return lines.c_str();
}

void fake_device_reset_counts() {
  std::lock_guard<std::mutex> lock(accounts.guard);
  accounts.eager.clear();
  accounts.in_graph.clear();
  accounts.allocations = accounts.to_host = accounts.to_host_bytes = 0;
  accounts.from_host = accounts.from_host_bytes = 0;
}

void fake_device_reset_peak() { accounts.peak = accounts.in_use.load(); }

void fake_device_set_limit(int64_t bytes) { accounts.limit = bytes; }

void fake_device_fail_next_over(int64_t bytes) { accounts.fail_over = bytes; }

// How many graphs run on this thread, after `change`: 1 enters one, -1 leaves it, 0 asks.
int fake_device_graphs(int change) {
  return graphs_running += change;
}
}
