#pragma once
// Macros that return errors to the caller. `auto x = QCOW_TRY(f());` takes the value of f's Result or returns its
// error.

#include <expected>
#include <utility>

#include "qcow/error.h"

namespace qcow {

/// Returns the value of a Result that has one. QCOW_TRY uses it, because its value may be ignored without a warning:
/// `QCOW_TRY(storage.read(...));`
template <class T>
T value_of(std::expected<T, Error>&& result) {
    return *std::move(result);
}

}  // namespace qcow

// The macros are statement expressions (GCC, Clang). A counter gives each temporary its own name, so uses can be
// nested.
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

/// Evaluates an expression of type Result<T> to its value. On an error, returns it from the enclosing function.
#define QCOW_TRY(...) QCOW_TRY_AS_(QCOW_JOIN_(qcow_try_, __COUNTER__), __VA_ARGS__)

/// Evaluates an expression of type Result<void>. On an error, returns it from the enclosing function. A statement.
#define QCOW_TRY_VOID(...) QCOW_TRY_VOID_AS_(QCOW_JOIN_(qcow_try_, __COUNTER__), __VA_ARGS__)
