#pragma once
// What tests ask of a Result.

#include <gtest/gtest.h>

#include <initializer_list>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "qcow/error.h"

namespace qcow::test {

/// The value of a Result that must have one; the test fails with the error's message where it has not.
template <class T>
T must(Result<T> result) {
    if (!result) throw std::runtime_error(result.error().message());
    if constexpr (!std::is_void_v<T>) return *std::move(result);
}

/// Whether the Result is an error with this code and a message that contains all of `parts`.
template <class T>
testing::AssertionResult fails(const Result<T>& result, Errc code, std::initializer_list<std::string_view> parts = {}) {
    if (result) return testing::AssertionFailure() << "it succeeded";
    const auto message = result.error().message();
    if (result.error().code != code) {
        return testing::AssertionFailure() << "code " << static_cast<int>(result.error().code) << " instead of "
                                           << static_cast<int>(code) << ": " << message;
    }
    for (const auto part : parts) {
        if (message.find(part) == std::string::npos)
            return testing::AssertionFailure() << "no \"" << part << "\" in: " << message;
    }
    return testing::AssertionSuccess();
}

}  // namespace qcow::test
