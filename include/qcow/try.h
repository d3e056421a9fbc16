#pragma once
// Propagation of errors. `auto x = QCOW_TRY(f());` takes the value of f's Result, or returns its error.

#include <expected>
#include <utility>

#include "qcow/error.h"

namespace qcow {

/// Returns the value of a Result that has one. The macro QCOW_TRY uses it. Unlike the members of std::expected, it may
/// be called where the value is not used: `QCOW_TRY(storage.read(...));`
template <class T>
T value_of(std::expected<T, Error>&& result) {
    return *std::move(result);
}

}  // namespace qcow

// Statement expressions (GCC, Clang): std::expected has no operator for this. A counter gives each temporary a name of
// its own, so that uses can be nested.
#define QCOW_JOIN_EXPANDED_(a, b) a##b
#define QCOW_JOIN_(a, b) QCOW_JOIN_EXPANDED_(a, b)
#define QCOW_TRY_AS_(result, ...)                                       \
    __extension__({                                                     \
        auto result = (__VA_ARGS__);                                    \
        if (!result) return std::unexpected(std::move(result).error()); \
        ::qcow::value_of(std::move(result));                            \
    })
#define QCOW_TRY_VOID_AS_(result, ...)                         \
    do {                                                       \
        if (auto result = (__VA_ARGS__); !result) {            \
            return std::unexpected(std::move(result).error()); \
        }                                                      \
    } while (false)

/// Evaluates an expression of type Result<T>. Gives its value, or returns its error from the function around it.
#define QCOW_TRY(...) QCOW_TRY_AS_(QCOW_JOIN_(qcow_try_, __COUNTER__), __VA_ARGS__)

/// The same for Result<void>: a statement without a value.
#define QCOW_TRY_VOID(...) QCOW_TRY_VOID_AS_(QCOW_JOIN_(qcow_try_, __COUNTER__), __VA_ARGS__)
