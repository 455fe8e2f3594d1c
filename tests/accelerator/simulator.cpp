// A simulated accelerator: the torch device "sim", with two indices, that computes on the CPU.
//
// It is built to punish what a GPU punishes. Work is queued to streams, each with a thread, and is
// done as late as `set_delays` says. The host cannot read device memory. Freed memory is poisoned,
// in its stream's order, and given away again at once. Pinned memory may not be touched while a
// copy needs it. And every access of a kernel to device memory is compared with the earlier ones:
// two that no event, stream or wait of the host orders are a race, however the threads ran.
//
// Parts: regions of memory, clocks and streams, the race detector, device memory, pinned memory,
// operators, copies, what torch asks of a device, and the functions for Python.

#include <torch/extension.h>
#include <torch/library.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>

namespace simulated {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using c10::Stream;

constexpr int kDevices = 2;
constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr size_t kPage = 4096;
// Of each region; pages that nothing touches take no memory.
constexpr size_t kRegionBytes = size_t(4) << 30;
// As of CUDA's allocator.
constexpr size_t kBlockUnit = 512;
// Of new and of freed memory: a nan in every floating dtype.
constexpr int kPoison = 0xff;

using Lock = std::lock_guard<std::mutex>;

// ---------------------------------------------------------------------------------------------
// Regions of memory
//
// A region is mapped twice: at addresses that tensors have and that the host may not touch when it
// should not, and at addresses by which kernels reach the same bytes.

class Region {
 public:
  explicit Region(int access) {
    int file = memfd_create("simulated", 0);
    TORCH_CHECK(file >= 0 && ftruncate(file, kRegionBytes) == 0, "sim: no memory");
    visible_ = map(file, access);
    backing_ = map(file, PROT_READ | PROT_WRITE);
    close(file);
  }

  bool holds(const void* address) const {
    auto* byte = static_cast<const char*>(address);
    return byte >= visible_ && byte < visible_ + kRegionBytes;
  }

  char* backing(const void* address) const {
    return backing_ + (static_cast<const char*>(address) - visible_);
  }

  // Memory is never given back: blocks are kept and used again.
  char* extend(size_t bytes) {
    size_t begin = used_.fetch_add(bytes);
    TORCH_CHECK(begin + bytes <= kRegionBytes, "sim: out of memory");
    memset(backing_ + begin, kPoison, bytes);
    return visible_ + begin;
  }

 private:
  static char* map(int file, int access) {
    int flags = MAP_SHARED | MAP_NORESERVE;
    void* address = mmap(nullptr, kRegionBytes, access, flags, file, 0);
    TORCH_CHECK(address != MAP_FAILED, "sim: no addresses");
    return static_cast<char*>(address);
  }

  char* visible_;
  char* backing_;
  std::atomic<size_t> used_{0};
};

Region& device_region(int device) {
  static Region regions[kDevices] = {Region(PROT_NONE), Region(PROT_NONE)};
  return regions[device];
}

Region& pinned_region() {
  static Region region(PROT_READ | PROT_WRITE);
  return region;
}

// A touch of protected memory is counted, and the page opened, so that the program goes on and the
// test ends with a message. System calls report an error of their own (EFAULT).
std::atomic<long> device_touches{0};
std::atomic<long> pinned_touches{0};
struct sigaction action_before;

void on_fault(int number, siginfo_t* info, void* context) {
  bool is_pinned = pinned_region().holds(info->si_addr);
  bool is_device = device_region(0).holds(info->si_addr) || device_region(1).holds(info->si_addr);
  if (is_pinned || is_device) {
    (is_pinned ? pinned_touches : device_touches)++;
    auto page = reinterpret_cast<uintptr_t>(info->si_addr) / kPage * kPage;
    mprotect(reinterpret_cast<void*>(page), kPage, PROT_READ | PROT_WRITE);
  } else {
    sigaction(number, &action_before, nullptr);  // the instruction faults again
  }
}

void watch_for_faults() {
  device_region(0);
  device_region(1);
  pinned_region();  // a handler must not be the first to make them
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  struct sigaction present;
  sigaction(SIGSEGV, nullptr, &present);
  if (present.sa_sigaction == on_fault) return;
  action_before = present;
  sigaction(SIGSEGV, &action, nullptr);
}

// ---------------------------------------------------------------------------------------------
// Clocks and streams
//
// A clock says how many operations of each stream are known to be over: at a moment of a stream, or
// to the host. Threads of the host share one clock: what orders them (locks, queues of Python)
// cannot be seen here, so a wait of one of them counts for all.

using Clock = std::map<int, uint64_t>;

void merge(Clock& clock, const Clock& other) {
  for (auto& [stream, count] : other) clock[stream] = std::max(clock[stream], count);
}

std::mutex clocks_mutex;
Clock host_clock;

// Microseconds at most.
std::atomic<int> kernel_delay{0};
std::atomic<int> copy_delay{0};

// One operation in eight is late: a sleep takes at least some 60 microseconds.
void sleep_up_to(int microseconds) {
  static thread_local std::mt19937 draw(std::random_device{}());
  if (microseconds <= 0 || draw() % 8) return;
  std::this_thread::sleep_for(std::chrono::microseconds(draw() % (microseconds + 1)));
}

struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  bool is_over = false;
  std::chrono::steady_clock::time_point time;
  Clock clock;

  void end() {
    {
      Lock lock(mutex);
      is_over = true;
      time = std::chrono::steady_clock::now();
    }
    changed.notify_all();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return is_over; });
  }

  bool query() {
    Lock lock(mutex);
    return is_over;
  }
};

using EventPointer = std::shared_ptr<Event>;

void tell_host(const EventPointer& event) {
  Lock lock(clocks_mutex);
  merge(host_clock, event->clock);
}

class Queue {
 public:
  Queue(int device, int64_t id, int number) : device(device), id(id), number(number) {
    std::thread([this] { run(); }).detach();
  }

  const int device;
  const int64_t id;
  const int number;  // of all streams
  Clock clock;       // guarded by `clocks_mutex`

  std::string name() const { return std::to_string(device) + ":" + std::to_string(id); }

  void push(std::function<void()> task) {
    {
      Lock lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    changed_.notify_all();
  }

  bool is_idle() {
    Lock lock(mutex_);
    return tasks_.empty() && !is_busy_;
  }

  // An operation begins: it comes after what the host knows, and counts.
  void begin_operation() {
    Lock lock(clocks_mutex);
    merge(clock, host_clock);
    clock[number]++;
  }

  EventPointer record() {
    auto event = std::make_shared<Event>();
    {
      Lock lock(clocks_mutex);
      merge(clock, host_clock);
      event->clock = clock;
    }
    push([event] { event->end(); });
    return event;
  }

  void wait_for(const EventPointer& event) {
    {
      Lock lock(clocks_mutex);
      merge(clock, event->clock);
    }
    push([event] { event->wait(); });
  }

  // The host waits for all work; an error of a kernel is raised here.
  void synchronize() {
    auto event = record();
    event->wait();
    tell_host(event);
    Lock lock(mutex_);
    std::string error;
    error.swap(error_);
    TORCH_CHECK(error.empty(), "sim: error in a kernel: ", error);
  }

 private:
  void run() {
    at::AutoDispatchBelowADInplaceOrView below;
    at::NoGradGuard no_grad;
    while (true) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        is_busy_ = false;
        changed_.wait(lock, [this] { return !tasks_.empty(); });
        task = std::move(tasks_.front());
        tasks_.pop_front();
        is_busy_ = true;
      }
      try {
        task();
      } catch (const std::exception& error) {
        Lock lock(mutex_);
        if (error_.empty()) error_ = error.what();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool is_busy_ = false;
  std::string error_;
};

std::mutex queues_mutex;
std::map<std::pair<int, int64_t>, Queue*> queues;  // their threads run until the process ends
std::atomic<int64_t> streams_made[kDevices];

thread_local int current_device = 0;
thread_local int64_t current_streams[kDevices] = {0, 0};

Queue* find_queue(int device, int64_t id) {
  Lock lock(queues_mutex);
  auto& queue = queues[{device, id}];
  if (!queue) queue = new Queue(device, id, int(queues.size()));
  return queue;
}

Queue* find_queue(const Stream& stream) { return find_queue(stream.device_index(), stream.id()); }

Queue* current_queue(int device) { return find_queue(device, current_streams[device]); }

std::vector<Queue*> queues_of(int device) {
  Lock lock(queues_mutex);
  std::vector<Queue*> found;
  for (auto& [key, queue] : queues) {
    if (key.first == device) found.push_back(queue);
  }
  return found;
}

// Changes of the current device that make a context on CUDA; torch's guards around kernels do not.
std::atomic<long> visits[kDevices];

void visit(int device) {
  TORCH_CHECK(device >= 0 && device < kDevices, "sim: invalid device index ", device);
  if (device != current_device) visits[device]++;
  current_device = device;
}

// ---------------------------------------------------------------------------------------------
// The race detector
//
// For each block of memory, the accesses that later ones are still to be compared with. Two that
// overlap race if one writes, and the later one's stream does not know that the earlier one is
// over.

struct Access {
  const char* begin;
  const char* end;
  int stream;
  uint64_t count;  // of the stream's clock
  bool is_write;
  std::string label;
};

std::map<const char*, std::vector<Access>> accesses;  // by the block's begin
std::vector<std::string> races;
PyObject* where_function = nullptr;

// The lines of Python that the calling thread runs.
std::string where() {
  bool has_python = Py_IsInitialized() && PyGILState_GetThisThreadState();
  if (!where_function || !has_python) return "a thread without Python";
  pybind11::gil_scoped_acquire gil;
  pybind11::error_scope pending;  // an error on its way stays
  auto function = pybind11::reinterpret_borrow<pybind11::object>(where_function);
  return function().cast<std::string>();
}

void note(const char* block, Access access, Queue* queue) {
  Lock lock(clocks_mutex);
  access.stream = queue->number;
  access.count = queue->clock[queue->number];
  std::vector<Access> kept;
  for (auto& earlier : accesses[block]) {
    bool overlaps = earlier.begin < access.end && access.begin < earlier.end;
    bool is_known = earlier.count <= queue->clock[earlier.stream];
    if (overlaps && !is_known && (access.is_write || earlier.is_write)) {
      races.push_back(access.label + (access.is_write ? " writes" : " reads") + " in stream " +
                      queue->name() + ", not after " + earlier.label +
                      (earlier.is_write ? " wrote" : " read"));
    }
    // What comes after this access comes after what it covers.
    bool is_covered = access.begin <= earlier.begin && earlier.end <= access.end && is_known;
    bool replaces = access.is_write || (!earlier.is_write && earlier.stream == access.stream);
    if (!(is_covered && replaces)) kept.push_back(earlier);
  }
  kept.push_back(std::move(access));
  accesses[block].swap(kept);
}

// ---------------------------------------------------------------------------------------------
// Device memory
//
// A freed block goes back to the stream that it was made in, as with CUDA's allocator: the next one
// of its size in that stream has it at once, while other streams may still read it.

struct Block {
  char* begin;
  size_t size;
  int device;
  int64_t stream;
  std::set<Queue*> users;         // other streams that `record_stream` has named
  std::vector<EventPointer> ends;  // of their work, once the block is freed
};

std::mutex blocks_mutex;
std::map<const char*, Block*> blocks;
std::map<std::tuple<int, int64_t, size_t>, std::vector<Block*>> free_blocks;
std::vector<Block*> waiting_blocks;
std::atomic<long> live_bytes[kDevices];
std::atomic<long> peak_bytes[kDevices];

Block* find_block(const void* address) {
  Lock lock(blocks_mutex);
  auto next = blocks.upper_bound(static_cast<const char*>(address));
  TORCH_CHECK(next != blocks.begin(), "sim: not an address on a device");
  return std::prev(next)->second;
}

void give_back(Block* block) {
  Queue* queue = find_queue(block->device, block->stream);
  queue->begin_operation();
  Access access{block->begin, block->begin + block->size, 0, 0, true, "freeing at " + where()};
  note(block->begin, access, queue);
  char* begin = device_region(block->device).backing(block->begin);
  size_t size = block->size;
  queue->push([begin, size] { memset(begin, kPoison, size); });
  Lock lock(blocks_mutex);
  free_blocks[{block->device, block->stream, block->size}].push_back(block);
}

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  live_bytes[block->device] -= block->size;
  if (block->users.empty()) return give_back(block);
  for (Queue* user : block->users) block->ends.push_back(user->record());
  block->users.clear();
  Lock lock(blocks_mutex);
  waiting_blocks.push_back(block);
}

// Give back the blocks that no other stream uses any more.
void collect_blocks() {
  std::vector<Block*> ready;
  {
    Lock lock(blocks_mutex);
    std::vector<Block*> waiting;
    for (Block* block : waiting_blocks) {
      bool is_over = true;
      for (auto& end : block->ends) is_over = is_over && end->query();
      (is_over ? ready : waiting).push_back(block);
    }
    waiting_blocks.swap(waiting);
  }
  for (Block* block : ready) {
    for (auto& end : block->ends) find_queue(block->device, block->stream)->wait_for(end);
    block->ends.clear();
    give_back(block);
  }
}

void free_nothing(void*) {}

class DeviceMemory final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    int device = current_device;
    Device place(kType, DeviceIndex(device));
    if (!bytes) return {nullptr, nullptr, &free_nothing, place};
    collect_blocks();
    Block* block = find_free(device, (bytes + kBlockUnit - 1) / kBlockUnit * kBlockUnit);
    long now = live_bytes[device] += block->size;
    if (now > peak_bytes[device]) peak_bytes[device] = now;
    return {block->begin, block, &free_block, place};
  }

  void recordStream(const c10::DataPtr& data, Stream stream) override {
    auto* block = static_cast<Block*>(data.get_context());
    if (block && stream.id() != block->stream) block->users.insert(find_queue(stream));
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "sim: copy"); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex) override { return {}; }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override {
    peak_bytes[device] = live_bytes[device].load();
  }

 private:
  static Block* find_free(int device, size_t size) {
    int64_t stream = current_streams[device];
    Lock lock(blocks_mutex);
    auto& found = free_blocks[{device, stream, size}];
    if (!found.empty()) {
      Block* block = found.back();
      found.pop_back();
      return block;
    }
    auto* block = new Block{device_region(device).extend(size), size, device, stream, {}, {}};
    blocks[block->begin] = block;
    return block;
  }
};

DeviceMemory device_memory;
REGISTER_ALLOCATOR(kType, &device_memory);

// ---------------------------------------------------------------------------------------------
// Pinned memory
//
// Blocks are powers of two, as torch makes them. While a copy into one is queued the host may not
// touch it; while a copy from one is queued the host may not write.

struct PinnedBlock {
  char* begin;
  size_t size;    // whole pages, which can be protected
  size_t counted;  // the power of two
  int incoming = 0;
  int outgoing = 0;
  bool is_freed = false;
};

std::mutex pinned_mutex;
std::map<const char*, PinnedBlock*> pinned_blocks;
std::map<size_t, std::vector<PinnedBlock*>> free_pinned;
std::atomic<long> pinned_bytes{0};
std::atomic<long> peak_pinned_bytes{0};

void protect(PinnedBlock* block) {
  int access = PROT_READ | PROT_WRITE;
  if (block->outgoing) access = PROT_READ;
  if (block->incoming) access = PROT_NONE;
  mprotect(block->begin, block->size, access);
}

void reuse(PinnedBlock* block) {
  block->is_freed = false;
  memset(pinned_region().backing(block->begin), kPoison, block->size);
  free_pinned[block->counted].push_back(block);
}

// Called when a copy is queued (by +1) and when it is over (by -1).
void count_copies(const void* address, bool is_incoming, int change) {
  Lock lock(pinned_mutex);
  auto next = pinned_blocks.upper_bound(static_cast<const char*>(address));
  PinnedBlock* block = std::prev(next)->second;
  (is_incoming ? block->incoming : block->outgoing) += change;
  protect(block);
  if (block->is_freed && !block->incoming && !block->outgoing) reuse(block);
}

void free_pinned_block(void* context) {
  auto* block = static_cast<PinnedBlock*>(context);
  Lock lock(pinned_mutex);
  pinned_bytes -= block->counted;
  block->is_freed = true;
  if (!block->incoming && !block->outgoing) reuse(block);
}

class PinnedMemory final : public at::HostAllocator {
 public:
  at::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, &free_nothing, Device(c10::kCPU)};
    size_t counted = 1;
    while (counted < bytes) counted *= 2;
    Lock lock(pinned_mutex);
    auto& found = free_pinned[counted];
    if (found.empty()) found.push_back(make(counted));
    PinnedBlock* block = found.back();
    found.pop_back();
    long now = pinned_bytes += counted;
    if (now > peak_pinned_bytes) peak_pinned_bytes = now;
    return {block->begin, block, &free_pinned_block, Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }
  bool record_event(void*, void*, Stream) override { return true; }  // copies are counted anyway
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}

 private:
  static PinnedBlock* make(size_t counted) {
    size_t size = std::max(counted, kPage);
    auto* block = new PinnedBlock{pinned_region().extend(size), size, counted};
    pinned_blocks[block->begin] = block;
    return block;
  }
};

PinnedMemory pinned_memory;
REGISTER_HOST_ALLOCATOR(kType, &pinned_memory);

// ---------------------------------------------------------------------------------------------
// Operators
//
// Any operator that torch knows for the CPU runs here: its meta kernel finds the outputs' shapes,
// and the stream's thread calls the CPU's kernel on the second mapping of the tensors' memory. An
// operator without a meta kernel, or whose results are numbers, waits for the stream first.

bool is_ours(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kType; }

char* data_of(const Tensor& tensor) {
  auto* begin = static_cast<char*>(tensor.unsafeGetTensorImpl()->storage().mutable_data());
  return begin ? begin + tensor.storage_offset() * tensor.itemsize() : nullptr;
}

// The same elements as a tensor of the CPU, by which a kernel reaches them.
Tensor as_kernel_sees(const Tensor& tensor, const Region& region) {
  char* data = data_of(tensor);
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(c10::kCPU);
  void* address = data ? region.backing(data) : nullptr;
  Tensor seen = at::from_blob(address, tensor.sizes(), tensor.strides(), free_nothing, options);
  return tensor.is_conj() ? at::conj(seen) : seen;
}

Tensor as_kernel_sees(const Tensor& tensor) {
  return as_kernel_sees(tensor, device_region(tensor.device().index()));
}

void note_tensor(const Tensor& tensor, Queue* queue, bool is_write, const std::string& label) {
  if (!is_ours(tensor) || !tensor.numel()) return;
  int64_t last = 0;
  for (int64_t axis = 0; axis < tensor.dim(); axis++) {
    last += (tensor.size(axis) - 1) * tensor.stride(axis);
  }
  const char* begin = data_of(tensor);
  const char* end = begin + (last + 1) * tensor.itemsize();
  note(find_block(begin)->begin, Access{begin, end, 0, 0, is_write, label}, queue);
}

using TensorFunction = std::function<Tensor(const Tensor&)>;

// An argument or result with each of its tensors replaced.
IValue replaced(const IValue& value, const TensorFunction& function, Device device) {
  if (value.isTensor()) return function(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(function(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector()) {
      list.push_back(tensor ? std::optional<Tensor>(function(*tensor)) : std::nullopt);
    }
    return list;
  }
  return value.isDevice() ? IValue(device) : value;
}

std::vector<Tensor> tensors_of(const IValue& value) {
  std::vector<Tensor> found;
  auto keep = [&found](const Tensor& tensor) {
    if (tensor.defined()) found.push_back(tensor);
    return tensor;
  };
  replaced(value, keep, Device(c10::kCPU));
  return found;
}

// A number of the program's, such as the 2.0 in x * 2.0, must not decide a result's dtype.
Tensor keep_kind(const Tensor& made, const Tensor& original) {
  bool is_number = original.unsafeGetTensorImpl()->is_wrapped_number();
  if (is_number) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

Tensor as_meta(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  if (tensor.device().is_cpu() && tensor.dim() == 0) return keep_kind(tensor.clone(), tensor);
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(c10::kMeta);
  return keep_kind(at::empty_strided(tensor.sizes(), tensor.strides(), options), tensor);
}

// Make storage larger, with its bytes, in the current stream.
void enlarge(c10::StorageImpl* storage, size_t bytes, int device) {
  c10::DeviceGuard guard(Device(kType, DeviceIndex(device)));
  c10::DataPtr fresh = device_memory.allocate(bytes);
  if (size_t before = std::min(storage->nbytes(), bytes)) {
    Queue* queue = current_queue(device);
    queue->begin_operation();
    auto* from = static_cast<const char*>(storage->data());
    auto* to = static_cast<const char*>(fresh.get());
    std::string label = "resizing at " + where();
    note(find_block(from)->begin, Access{from, from + before, 0, 0, false, label}, queue);
    note(find_block(to)->begin, Access{to, to + before, 0, 0, true, label}, queue);
    char* source = device_region(device).backing(from);
    char* target = device_region(device).backing(to);
    queue->push([=] { memcpy(target, source, before); });
  }
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(bytes);
}

void reshape(const Tensor& tensor, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  auto* implementation = tensor.unsafeGetTensorImpl();
  implementation->set_sizes_and_strides(sizes, strides);
  if (!tensor.numel()) return;
  int64_t last = tensor.storage_offset();
  for (size_t axis = 0; axis < sizes.size(); axis++) last += (sizes[axis] - 1) * strides[axis];
  size_t bytes = (last + 1) * tensor.itemsize();
  auto* storage = implementation->unsafe_storage().unsafeGetStorageImpl();
  if (storage->nbytes() < bytes) enlarge(storage, bytes, tensor.device().index());
}

// One call of an operator.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), stack_(stack) {
    size_t count = op.schema().arguments().size();
    arguments_.assign(stack->end() - count, stack->end());
    stack->resize(stack->size() - count);
    for (const IValue& argument : arguments_) {
      for (const Tensor& tensor : tensors_of(argument)) {
        if (is_ours(tensor) && !device_) device_ = tensor.device();
      }
    }
    name_ = toString(op.schema().operator_name());
    TORCH_CHECK(device_, "sim: no kernel for ", name_);
    queue_ = current_queue(device_->index());
    label_ = name_ + " at " + where();
  }

  void run() {
    c10::DeviceGuard guard(*device_);
    queue_->begin_operation();
    if (find_shapes()) {
      launch();
    } else {
      run_now();
    }
  }

 private:
  bool is_written(size_t index) const {
    auto* alias = op_.schema().arguments()[index].alias_info();
    return alias && alias->isWrite();
  }

  // The argument that a result is, such as that of `add_`.
  const IValue* find_argument(size_t result) const {
    auto* alias = op_.schema().returns()[result].alias_info();
    if (!alias || !alias->isWrite()) return nullptr;
    for (size_t index = 0; index < arguments_.size(); index++) {
      if (is_written(index) && *op_.schema().arguments()[index].alias_info() == *alias) {
        return &arguments_[index];
      }
    }
    TORCH_CHECK(false, "sim: unknown result of ", name_);
  }

  bool find_shapes() {
    for (const auto& result : op_.schema().returns()) {
      auto kind = result.type()->kind();
      if (kind != c10::TypeKind::TensorType && kind != c10::TypeKind::ListType) return false;
    }
    for (const IValue& argument : arguments_) {
      meta_arguments_.push_back(replaced(argument, as_meta, Device(c10::kMeta)));
    }
    shapes_ = meta_arguments_;
    try {
      op_.callBoxed(&shapes_);
    } catch (const std::exception&) {
      return false;
    }
    return true;
  }

  std::vector<IValue> arguments_for_kernel() const {
    auto seen = [](const Tensor& tensor) {
      if (!tensor.defined()) return tensor;
      return is_ours(tensor) ? as_kernel_sees(tensor) : keep_kind(tensor.clone(), tensor);
    };
    std::vector<IValue> values;
    for (const IValue& argument : arguments_) {
      values.push_back(replaced(argument, seen, Device(c10::kCPU)));
    }
    return values;
  }

  void note_arguments() {
    for (bool is_write : {false, true}) {
      for (size_t index = 0; index < arguments_.size(); index++) {
        if (is_written(index) != is_write) continue;
        for (const Tensor& tensor : tensors_of(arguments_[index])) {
          note_tensor(tensor, queue_, is_write, label_);
        }
      }
    }
  }

  // A tensor of `out=` takes the result's shape.
  void resize_outputs() {
    for (size_t index = 0; index < arguments_.size(); index++) {
      if (!is_written(index)) continue;
      auto tensors = tensors_of(arguments_[index]);
      auto wanted = tensors_of(meta_arguments_[index]);
      for (size_t k = 0; k < tensors.size(); k++) {
        if (is_ours(tensors[k]) && tensors[k].sizes() != wanted[k].sizes()) {
          reshape(tensors[k], wanted[k].sizes(), wanted[k].strides());
        }
      }
    }
  }

  Tensor make_result(const Tensor& like) {
    auto options = at::TensorOptions().dtype(like.dtype()).device(*device_);
    Tensor result = at::empty_strided(like.sizes(), like.strides(), options);
    note_tensor(result, queue_, true, label_);
    return result;
  }

  void launch() {
    resize_outputs();
    auto values = std::make_shared<std::vector<IValue>>(arguments_for_kernel());
    note_arguments();
    auto targets = std::make_shared<std::vector<std::vector<Tensor>>>();
    for (size_t index = 0; index < shapes_.size(); index++) {
      auto& of_result = targets->emplace_back();
      if (const IValue* argument = find_argument(index)) {
        stack_->push_back(*argument);
        continue;
      }
      auto make = [this, &of_result](const Tensor& like) {
        if (!like.defined()) return like;
        Tensor result = make_result(like);
        of_result.push_back(as_kernel_sees(result));
        return result;
      };
      stack_->push_back(replaced(shapes_[index], make, *device_));
    }
    queue_->push([op = op_, values, targets] {
      sleep_up_to(kernel_delay);
      op.callBoxed(values.get());
      for (size_t index = 0; index < targets->size(); index++) {
        auto& of_result = (*targets)[index];
        if (of_result.empty()) continue;
        auto made = tensors_of((*values)[index]);
        for (size_t k = 0; k < of_result.size(); k++) of_result[k].copy_(made[k]);
      }
    });
  }

  void run_now() {
    note_arguments();
    queue_->synchronize();
    auto values = arguments_for_kernel();
    op_.callBoxed(&values);
    for (size_t index = 0; index < values.size(); index++) {
      if (const IValue* argument = find_argument(index)) {
        stack_->push_back(*argument);
        continue;
      }
      auto move = [this](const Tensor& value) {
        if (!value.defined()) return value;
        Tensor result = make_result(value);
        as_kernel_sees(result).copy_(value);
        return result;
      };
      stack_->push_back(replaced(values[index], move, *device_));
    }
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  std::vector<IValue> arguments_;
  std::optional<Device> device_;
  std::string name_;
  std::string label_;
  Queue* queue_;
  std::vector<IValue> meta_arguments_;
  std::vector<IValue> shapes_;
};

void run_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  Call(op, stack).run();
}

// ---------------------------------------------------------------------------------------------
// Copies
//
// As with CUDA: one that need not wait does not if the host's memory is pinned. From other memory
// of the host the values are taken at once, and copied later; to it every copy waits.

void copy_between_devices(const Tensor& from, const Tensor& to, const std::string& label) {
  c10::DeviceGuard guard(from.device());
  Queue* queue = current_queue(from.device().index());
  Queue* other = current_queue(to.device().index());
  if (queue != other) queue->wait_for(other->record());
  queue->begin_operation();
  note_tensor(from, queue, false, label);
  note_tensor(to, queue, true, label);
  Tensor source = as_kernel_sees(from);
  Tensor target = as_kernel_sees(to);
  queue->push([source, target] {
    sleep_up_to(kernel_delay);
    target.copy_(source);
  });
  if (queue != other) other->wait_for(queue->record());
}

void copy_to_host(const Tensor& from, const Tensor& to, bool waits, const std::string& label) {
  if (from.scalar_type() != to.scalar_type() || !from.is_contiguous()) {
    // converted on the device
    Tensor converted = from.to(to.scalar_type()).expand_as(to).contiguous();
    if (!converted.is_same(from)) return copy_to_host(converted, to, waits, label);
  }
  Queue* queue = current_queue(from.device().index());
  queue->begin_operation();
  note_tensor(from, queue, false, label);
  Tensor source = as_kernel_sees(from);
  const void* address = data_of(to);
  if (waits || !pinned_region().holds(address)) {
    queue->synchronize();
    to.copy_(source);
    return;
  }
  Tensor target = as_kernel_sees(to, pinned_region());
  count_copies(address, true, 1);
  queue->push([source, target, address] {
    sleep_up_to(copy_delay);
    target.copy_(source);
    count_copies(address, true, -1);
  });
}

void copy_from_host(const Tensor& from, const Tensor& to, bool waits, const std::string& label) {
  Queue* queue = current_queue(to.device().index());
  queue->begin_operation();
  note_tensor(to, queue, true, label);
  Tensor target = as_kernel_sees(to);
  const void* address = data_of(from);
  bool is_pinned = pinned_region().holds(address);
  Tensor source = is_pinned ? as_kernel_sees(from, pinned_region()) : from.clone();
  if (is_pinned) count_copies(address, false, 1);
  queue->push([source, target, address, is_pinned] {
    sleep_up_to(copy_delay);
    target.copy_(source);
    if (is_pinned) count_copies(address, false, -1);
  });
  if (waits) queue->synchronize();
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (!to.numel()) return to;
  std::string label = "a copy at " + where();
  if (is_ours(from) && is_ours(to)) {
    copy_between_devices(from, to, label);
    return to;
  }
  c10::DeviceGuard guard(is_ours(from) ? from.device() : to.device());
  if (is_ours(from)) {
    copy_to_host(from, to, !non_blocking, label);
  } else {
    copy_from_host(from, to, !non_blocking, label);
  }
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar read_number(const Tensor& tensor) {
  Queue* queue = current_queue(tensor.device().index());
  queue->begin_operation();
  note_tensor(tensor, queue, false, "item at " + where());
  queue->synchronize();
  return as_kernel_sees(tensor).item();
}

// ---------------------------------------------------------------------------------------------
// What torch asks of a device: tensors, views, streams and settings

Tensor empty(c10::IntArrayRef sizes, std::optional<c10::ScalarType> dtype,
             std::optional<c10::Layout>, std::optional<Device> device, std::optional<bool>,
             std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  auto type = c10::dtype_or_default(dtype);
  return at::detail::empty_generic(sizes, &device_memory, keys, type, format);
}

Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides,
                     std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  auto type = c10::dtype_or_default(dtype);
  return at::detail::empty_strided_generic(sizes, strides, &device_memory, keys, type);
}

const Tensor& resize(const Tensor& tensor, c10::IntArrayRef sizes,
                     std::optional<at::MemoryFormat>) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(sizes[axis], 1);
  }
  if (tensor.sizes() != sizes) reshape(tensor, sizes, strides);
  return tensor;
}

Tensor as_strided(const Tensor& tensor, c10::IntArrayRef sizes, c10::IntArrayRef strides,
                  std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, sizes, strides, offset);
}

bool is_set_to(const Tensor& one, const Tensor& other) {
  return data_of(one) == data_of(other) && one.sizes() == other.sizes() &&
         one.strides() == other.strides();
}

void record_stream(Tensor& tensor, Stream stream) {
  device_memory.recordStream(tensor.storage().data_ptr(), stream);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("resize_", resize);
  library.impl("as_strided", as_strided);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("set_.source_Tensor", at::native::set_tensor_);
  library.impl("set_.source_Storage",
               static_cast<Tensor& (*)(Tensor&, at::Storage)>(at::native::set_));
  library.impl("set_.source_Storage_storage_offset",
               static_cast<Tensor& (*)(Tensor&, at::Storage, int64_t, c10::IntArrayRef,
                                       c10::IntArrayRef)>(at::cpu::set_));
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", read_number);
  library.impl("equal", [](const Tensor& one, const Tensor& other) {
    return at::equal(one.cpu(), other.cpu());
  });
  library.impl("is_set_to", is_set_to);
  library.impl("record_stream", record_stream);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_operator>());
}

// Other threads of Python go on while this one waits.
template <class Function>
void wait_without_gil(Function function) {
  if (Py_IsInitialized() && PyGILState_Check()) {
    pybind11::gil_scoped_release release;
    function();
  } else {
    function();
  }
}

EventPointer& event_of(void* event) { return *static_cast<EventPointer*>(event); }

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kType; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  Device getDevice() const override { return make_device(current_device); }
  void setDevice(Device device) const override { visit(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  Device exchangeDevice(Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "sim: invalid device index ", int(device.index()));
    Device before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }

  Stream getStream(Device device) const override {
    return make_stream(index_of(device), current_streams[index_of(device)]);
  }
  Stream getDefaultStream(Device device) const override {
    return make_stream(index_of(device), 0);
  }
  Stream getNewStream(Device device, int = 0) const override {
    // as many as CUDA's pool has
    int index = index_of(device);
    return make_stream(index, 1 + streams_made[index]++ % 32);
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getNewStream(device);
  }
  Stream exchangeStream(Stream stream) const override {
    Stream before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  bool queryStream(const Stream& stream) const override { return find_queue(stream)->is_idle(); }
  void synchronizeStream(const Stream& stream) const override {
    wait_without_gil([&] { find_queue(stream)->synchronize(); });
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    wait_without_gil([&] {
      for (Queue* queue : queues_of(device)) queue->synchronize();
    });
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const Stream& stream) const override {
    device_memory.recordStream(data, stream);
  }

  void record(void** event, const Stream& stream, const DeviceIndex,
              const c10::EventFlag) const override {
    if (!*event) *event = new EventPointer();
    event_of(*event) = find_queue(stream)->record();
  }
  void block(void* event, const Stream& stream) const override {
    if (event) find_queue(stream)->wait_for(event_of(event));
  }
  bool queryEvent(void* event) const override {
    if (!event) return true;
    bool is_over = event_of(event)->query();
    if (is_over) tell_host(event_of(event));
    return is_over;
  }
  void synchronizeEvent(void* event) const override {
    if (!event) return;
    wait_without_gil([&] {
      event_of(event)->wait();
      tell_host(event_of(event));
    });
  }
  double elapsedTime(void* before, void* after, const DeviceIndex) const override {
    auto passed = event_of(after)->time - event_of(before)->time;
    return std::chrono::duration<double, std::milli>(passed).count();
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<EventPointer*>(event);
  }

 private:
  static Device make_device(int index) { return Device(kType, DeviceIndex(index)); }
  static Stream make_stream(int device, int64_t id) {
    return Stream(Stream::UNSAFE, make_device(device), id);
  }
  static int index_of(Device device) {
    return device.index() < 0 ? current_device : device.index();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator : at::CPUGeneratorImpl {
  explicit Generator(DeviceIndex index) {
    device_ = Device(kType, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

class Hooks final : public at::PrivateUse1HooksInterface {
 public:
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(DeviceIndex device) const override { visit(device); }
  DeviceIndex getCurrentDevice() const override { return DeviceIndex(current_device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    auto before = DeviceIndex(current_device);
    if (device >= 0) visit(device);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    auto before = DeviceIndex(current_device);
    if (device >= 0) current_device = device;
    return before;
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* address) const override { return pinned_region().holds(address); }
  Device getDeviceFromPtr(void* address) const override {
    int index = device_region(1).holds(address) ? 1 : 0;
    return Device(kType, DeviceIndex(index));
  }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    static at::Generator generators[kDevices] = {at::make_generator<Generator>(DeviceIndex(0)),
                                                 at::make_generator<Generator>(DeviceIndex(1))};
    return generators[index < 0 ? current_device : index];
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    enlarge(storage.unsafeGetStorageImpl(), bytes, storage.device().index());
  }
};

const bool has_hooks = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

}  // namespace simulated

// ---------------------------------------------------------------------------------------------
// Functions for Python; `simulator.py` says what they are for.

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace simulated;
  watch_for_faults();
  module.attr("device_count") = kDevices;
  module.def("set_where", [](pybind11::object where) { where_function = where.release().ptr(); });
  module.def("set_delays", [](int kernel, int copy) {
    kernel_delay = kernel;
    copy_delay = copy;
  });
  module.def("sleep", [](int microseconds) {
    current_queue(current_device)->push([microseconds] {
      std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
    });
  });
  static EventPointer gate;
  module.def("hold", [] {
    gate = std::make_shared<Event>();
    current_queue(current_device)->push([held = gate] { held->wait(); });
  });
  module.def("release", [] { gate->end(); });
  module.def("current_device", [] { return current_device; });
  module.def("exchange_device", [](int device) {
    int before = current_device;
    visit(device);
    return before;
  });
  module.def("maybe_exchange_device", [](int device) { current_device = device; });
  module.def("races", [] {
    Lock lock(clocks_mutex);
    return races;
  });
  module.def("counts", [] {
    return std::map<std::string, long>{{"visits of device 0", visits[0]},
                                       {"visits of device 1", visits[1]},
                                       {"live", live_bytes[0] + live_bytes[1]},
                                       {"peak", peak_bytes[0] + peak_bytes[1]},
                                       {"pinned", pinned_bytes},
                                       {"peak pinned", peak_pinned_bytes},
                                       {"touches of device memory", device_touches},
                                       {"touches of pinned memory", pinned_touches}};
  });
  module.def("reset", [] {
    watch_for_faults();  // pytest may have set its own handler meanwhile
    Lock lock(clocks_mutex);
    races.clear();
    device_touches = 0;
    pinned_touches = 0;
    peak_pinned_bytes = pinned_bytes.load();
    for (int device = 0; device < kDevices; device++) {
      visits[device] = 0;
      peak_bytes[device] = live_bytes[device].load();
    }
  });
}
