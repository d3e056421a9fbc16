#pragma once
// Running one function on several threads.

#include <functional>

#include "qcow/error.h"

namespace qcow {

/// One a processor that this process may use.
unsigned default_workers();

/// Calls `work(0)` to `work(count - 1)` at once, each on a thread of its own (the last on the caller's; count > 0), and
/// waits for all. Gives the first error that any of them gave; the others are not told to stop. Where the system has no
/// more threads to give, those that there are do without them.
Result<void> run_workers(unsigned count, const std::function<Result<void>(unsigned)>& work);

}  // namespace qcow
