"""The release of Horovod that is built, and every change to its source, with the reason."""

from __future__ import annotations

from hvdscale.runtime.horovod_build.source import Edit, Source

__all__ = ["HOROVOD"]

_COMPILE = (
    Edit(
        "CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        'set(CMAKE_CXX_STANDARD 17)\nset(CMAKE_BUILD_RPATH "$ORIGIN/../../../..")',
        "TensorFlow's headers need C++17; and a cached wheel must find libmpi in the environment it is installed in, "
        "not in the one it was built in",
    ),
    Edit(
        "horovod/torch/CMakeLists.txt",
        "    set(CMAKE_CXX_STANDARD 14)",
        "    set(CMAKE_CXX_STANDARD 20)",
        "PyTorch's headers need C++20",
    ),
    Edit(
        "horovod/tensorflow/CMakeLists.txt",
        'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n',
        "",
        "the opt-in XLA operations need a header that TensorFlow's wheels no longer carry",
    ),
)

_CLOSED = (
    "an operation that is started in the moment in which Horovod stops came to a queue that nobody looks at any more, "
    "and its rank waited for ever; now the queue is closed, and the operation fails like any later one"
)

_CLOSE_QUEUES = (
    Edit(
        "horovod/common/tensor_queue.h",
        "  void FinalizeTensorQueue(const Status& status);\n",
        "  void FinalizeTensorQueue(const Status& status);\n\n  void Reopen();\n",
        _CLOSED,
    ),
    Edit(
        "horovod/common/tensor_queue.h",
        "  mutable std::mutex mutex_;\n",
        "  mutable std::mutex mutex_;\n\n  bool closed_ = false;\n",
        _CLOSED,
    ),
    Edit(
        "horovod/common/tensor_queue.cc",
        "  std::lock_guard<std::mutex> guard(mutex_);\n  if (tensor_table_.find(e.tensor_name)",
        "  std::lock_guard<std::mutex> guard(mutex_);\n  if (closed_) {\n    return SHUT_DOWN_ERROR;\n  }\n"
        "  if (tensor_table_.find(e.tensor_name)",
        _CLOSED,
    ),
    Edit(
        "horovod/common/tensor_queue.cc",
        "  std::lock_guard<std::mutex> guard(mutex_);\n\n  for (std::size_t i = 0; i < entries.size(); ++i) {",
        "  std::lock_guard<std::mutex> guard(mutex_);\n  if (closed_) {\n    return SHUT_DOWN_ERROR;\n  }\n"
        "  for (std::size_t i = 0; i < entries.size(); ++i) {",
        _CLOSED,
    ),
    Edit(
        "horovod/common/tensor_queue.cc",
        "  std::lock_guard<std::mutex> guard(mutex_);\n  for (auto& e : tensor_table_) {",
        "  std::lock_guard<std::mutex> guard(mutex_);\n  closed_ = true;\n  for (auto& e : tensor_table_) {",
        _CLOSED,
    ),
    Edit(
        "horovod/common/tensor_queue.cc",
        "// Helper function to get list of allreduced tensor names and total size for\n",
        "// After a shutdown Horovod may be started again.\nvoid TensorQueue::Reopen() {\n"
        "  std::lock_guard<std::mutex> guard(mutex_);\n  closed_ = false;\n}\n\n"
        "// Helper function to get list of allreduced tensor names and total size for\n",
        _CLOSED,
    ),
    *(
        Edit(
            "horovod/common/process_set.cc",
            f'  LOG(TRACE) << "Initializing new process set with {controller}: "\n',
            f'  tensor_queue.Reopen();\n  LOG(TRACE) << "Initializing new process set with {controller}: "\n',
            _CLOSED,
        )
        for controller in ("MPI", "Gloo")
    ),
)

_ASLEEP = (
    "each rank slept to a beat of its own, and then spun until the others' came: up to a core, with nothing to do; "
    "told so, all sleep from the moment in which they met, the longer the longer nobody had work, and a rank that "
    "waits for a late one soon sleeps, too"
)

_SLEEP_TOGETHER = (
    Edit(
        "horovod/common/operations.cc",
        "namespace common {\n\nnamespace {\n",
        "namespace common {\n\nbool ranks_are_idle = false;  // to the background thread alone\n\nnamespace {\n",
        _ASLEEP,
    ),
    Edit(
        "horovod/common/operations.cc",
        "  auto sleep_duration = state.last_cycle_start +\n"
        "                        std::chrono::microseconds(long(\n"
        "                            state.parameter_manager.CycleTimeMs() * 1000.)) -\n"
        "                        start_time;\n",
        """  static const char* cycles = std::getenv("HVDSCALE_CYCLES");
  static const bool together =
      cycles != nullptr && std::string(cycles) == "together";
  static auto last_work = start_time;
  ranks_are_idle = start_time - last_work > std::chrono::milliseconds(20);
  std::chrono::steady_clock::duration cycle_time = std::chrono::microseconds(
      long(state.parameter_manager.CycleTimeMs() * 1000.));
  if (together) {
    // What comes next is late by a hundredth of the time that nothing came.
    std::chrono::steady_clock::duration longest = std::chrono::milliseconds(20);
    cycle_time = std::max(cycle_time,
                          std::min((start_time - last_work) / 100, longest));
  }
  auto sleep_duration = state.last_cycle_start + cycle_time - start_time;
""",
        _ASLEEP,
    ),
    Edit(
        "horovod/common/operations.cc",
        "            : ResponseList();\n\n    if (process_set_id == 0) {\n",
        """            : ResponseList();
    if (together) {
      state.last_cycle_start = std::chrono::steady_clock::now();
      // Of what other process sets do, not every rank knows: with them no beat is longer.
      if (process_set_id != 0 || !response_list.responses().empty()) {
        last_work = state.last_cycle_start;
      }
    }

    if (process_set_id == 0) {
""",
        _ASLEEP,
    ),
    Edit(
        "horovod/common/mpi/mpi_controller.cc",
        "// MPIController\n",
        """extern bool ranks_are_idle;

// MPI_Allreduce in place, in which a rank that waits for long sleeps instead of spinning, where ranks have been idle.
static int AllreduceAsleep(std::vector<long long>& bits, int count, MPI_Op op,
                           MPI_Comm comm) {
  static const char* cycles = std::getenv("HVDSCALE_CYCLES");
  if (cycles == nullptr || std::string(cycles) != "together") {
    return MPI_Allreduce(MPI_IN_PLACE, bits.data(), count, MPI_LONG_LONG_INT,
                         op, comm);
  }
  using namespace std::chrono;
  MPI_Request request;
  int code = MPI_Iallreduce(MPI_IN_PLACE, bits.data(), count,
                            MPI_LONG_LONG_INT, op, comm, &request);
  auto patience_ends = steady_clock::now() + microseconds(200);
  auto pause = microseconds(50);
  int done = 0, looks = 0;
  while (code == MPI_SUCCESS) {
    code = MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (done) {
      break;
    }
    if (!ranks_are_idle || steady_clock::now() < patience_ends || ++looks % 16) {
      std::this_thread::yield();  // MPI does not look at every connection each time
    } else {
      std::this_thread::sleep_for(pause);
      pause = std::min(2 * pause, microseconds(1000));
    }
  }
  return code;
}

// MPIController
""",
        _ASLEEP,
    ),
    Edit(
        "horovod/common/mpi/mpi_controller.cc",
        "#include <numeric>\n",
        "#include <algorithm>\n#include <chrono>\n#include <cstdlib>\n#include <numeric>\n#include <string>\n"
        "#include <thread>\n",
        _ASLEEP,
    ),
    *(
        Edit(
            "horovod/common/mpi/mpi_controller.cc",
            "  int ret_code = MPI_Allreduce(MPI_IN_PLACE, bitvector.data(), count,\n"
            f"                               MPI_LONG_LONG_INT, {operation}, mpi_ctx_.mpi_comm);\n",
            f"  int ret_code =\n      AllreduceAsleep(bitvector, count, {operation}, mpi_ctx_.mpi_comm);\n",
            _ASLEEP,
        )
        for operation in ("MPI_BAND", "MPI_BOR")
    ),
)

_LET_GO_OF_PYTHON = (
    Edit(
        "horovod/torch/mpi_ops_v2.cc",
        "PYBIND11_MODULE(mpi_lib_v2, m) {\n",
        """
// What starts an operation lets go of Python's lock; what waits for one does so by itself.
struct Definitions {
  py::module_& module;

  template <class Function> void def(const std::string& name, Function function) {
    if (name == "horovod_torch_poll" || name == "horovod_torch_wait_and_clear" || name == "horovod_torch_reset") {
      module.def(name.c_str(), function);
    } else {
      module.def(name.c_str(), function, py::call_guard<py::gil_scoped_release>());
    }
  }
};

PYBIND11_MODULE(mpi_lib_v2, defined) {
  Definitions m{defined};
""",
        "in PyTorch of today a thread that gives up a tensor needs Python's lock: Horovod's does so under locks of its "
        "own, for which a rank that starts an operation waited with Python's lock in hand, and both for ever",
    ),
)

_FOR_CUDA = (
    Edit(
        "cmake/Modules/FindPytorch.cmake",
        'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)',
        'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)\n'
        'if ("$ENV{HVDSCALE_GPU_NONE}" STREQUAL "1")\n    set(Pytorch_CUDA FALSE)\nendif()',
        "a CUDA toolkit that happens to be here must not decide what is built",
    ),
    Edit(
        "CMakeLists.txt",
        'file(APPEND "${CMAKE_LIBRARY_OUTPUT_DIRECTORY_ROOT}/metadata.json" "\\"dummy\\": \\"none\\"\\n}")',
        'file(APPEND "${CMAKE_LIBRARY_OUTPUT_DIRECTORY_ROOT}/metadata.json" '
        '"\\"gpu\\": \\"$ENV{HVDSCALE_GPU_RECORD}\\",\\n\\"dummy\\": \\"none\\"\\n}")',
        "the wheel says what it does about GPUs",
    ),
    Edit(
        "horovod/common/ops/cuda/CMakeLists.txt",
        "set(CMAKE_CUDA_STANDARD 11)",
        "set(CMAKE_CUDA_STANDARD 17)",
        "the headers of CUDA 13 need C++17",
    ),
    Edit(
        "horovod/torch/cuda_util.cc",
        'dlopen("libcuda.so", RTLD_LAZY)',
        'dlopen("libcuda.so.1", RTLD_LAZY)',
        "the driver's library by the name it has on every machine, not by the one for compiling",
    ),
)

HOROVOD = Source(
    "0.28.1",
    "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0",
    (*_COMPILE, *_CLOSE_QUEUES, *_SLEEP_TOGETHER, *_LET_GO_OF_PYTHON),
    _FOR_CUDA,
)
