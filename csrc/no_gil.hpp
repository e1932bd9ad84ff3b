// Lets other Python threads run while a call blocks.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace computron {

class NoGil {
 public:
  NoGil() : state_(PyEval_SaveThread()) {}
  NoGil(const NoGil&) = delete;
  NoGil& operator=(const NoGil&) = delete;
  // Before 3.14 Python ends a daemon thread that asks for the GIL of an interpreter in its last moments by unwinding
  // its stack, which C++ answers with std::terminate. Such a thread stays here instead, as it does from 3.14 on, until
  // the process ends. Should the last moments begin in between, unwinding is at least allowed.
  ~NoGil() noexcept(false) {
    while (is_finalizing()) pause();
    PyEval_RestoreThread(state_);
  }

 private:
  static bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing();
#else
    return _Py_IsFinalizing();
#endif
  }

  PyThreadState* const state_;
};

}  // namespace computron
