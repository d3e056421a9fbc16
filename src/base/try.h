#pragma once
// The library's own short names for the propagation of errors, and how it makes them.

#include "qcow/try.h"

#define TRY(...) QCOW_TRY(__VA_ARGS__)
#define TRY_VOID(...) QCOW_TRY_VOID(__VA_ARGS__)

namespace qcow {

/// An error as a function's result: `return fail(Errc::corrupt, "header", "...")`.
inline std::unexpected<Error> fail(Errc code, std::string place, std::string what) {
    return std::unexpected(Error{code, std::move(place), std::move(what)});
}

}  // namespace qcow
