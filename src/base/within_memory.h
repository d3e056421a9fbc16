#pragma once
// Memory that runs out, as an error like others.

#include <new>

#include "base/try.h"

namespace qcow {

/// Gives the result of `work`, or Errc::no_memory where it ran out of memory. Opening, reading,
/// changing, checking, copying and making images go through it, so that they throw nothing. The error is short enough
/// to take no memory itself.
template <class Work>
auto within_memory(Work&& work) -> decltype(work()) {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        return fail(Errc::no_memory, "", "out of memory");
    }
}

}  // namespace qcow
