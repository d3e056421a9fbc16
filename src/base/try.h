#pragma once
// Propagation of errors. `auto x = TRY(f());` gives the value of f, or returns its error from this function.

#include <expected>
#include <utility>

#include "qcow/error.h"

namespace qcow {

/// Takes the value out of a result that has one. Unlike the members of std::expected it may be called for nothing but
/// the check: `TRY(storage.read(...))` where the count does not matter.
template <class T>
T value_of(std::expected<T, Error>&& result) {
    return *std::move(result);
}

}  // namespace qcow

// Statement expressions (GCC, Clang), because std::expected has no operator for it. The counter names the temporaries
// of nested uses apart.
#define QCOW_JOIN_(a, b) a##b
#define QCOW_JOIN(a, b) QCOW_JOIN_(a, b)
#define QCOW_TRY(result, ...)                                           \
    __extension__({                                                     \
        auto result = (__VA_ARGS__);                                    \
        if (!result) return std::unexpected(std::move(result).error()); \
        ::qcow::value_of(std::move(result));                            \
    })
#define QCOW_TRY_VOID(result, ...)                             \
    do {                                                       \
        if (auto result = (__VA_ARGS__); !result) {            \
            return std::unexpected(std::move(result).error()); \
        }                                                      \
    } while (false)

#define TRY(...) QCOW_TRY(QCOW_JOIN(try_result_, __COUNTER__), __VA_ARGS__)

/// The same for a function that gives no value.
#define TRY_VOID(...) QCOW_TRY_VOID(QCOW_JOIN(try_result_, __COUNTER__), __VA_ARGS__)

namespace qcow {

/// An error as a function's result: `return fail(Errc::corrupt, "header", "...")`.
inline std::unexpected<Error> fail(Errc code, std::string place, std::string what) {
    return std::unexpected(Error{code, std::move(place), std::move(what)});
}

}  // namespace qcow
