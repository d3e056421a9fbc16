#pragma once
// The library's boundary: no exception crosses it.

#include <new>
#include <stdexcept>

#include "base/try.h"

namespace qcow {

/// Gives the result of `work`, or Errc::no_memory where it ran out of memory. Every public function that returns a
/// Result does its work in here, so that it throws nothing. The error is short enough to take no memory itself.
template <class Work>
auto within_memory(Work&& work) -> decltype(work()) {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        return fail(Errc::no_memory, "", "out of memory");
    } catch (const std::length_error&) {
        return fail(Errc::no_memory, "", "out of memory");  // more than any memory can hold
    }
}

}  // namespace qcow
