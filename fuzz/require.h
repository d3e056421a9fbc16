#pragma once
// What must hold for every input: a violation ends the process, which is how fuzzers learn of it.

#include <cstdio>
#include <cstdlib>

#include "qcow/error.h"

#define QCOW_REQUIRE(condition)                                                                 \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                                       \
        }                                                                                       \
    } while (false)

namespace qcow::fuzz {

/// An error is a sentence on one line.
inline void require_good(const Error& error) {
    QCOW_REQUIRE(!error.what.empty());
    for (const char c : error.message()) QCOW_REQUIRE(static_cast<unsigned char>(c) >= 0x20 && c != 0x7f);
}

/// The same for the error of a result, if it has one. Whether it has none.
template <class T>
bool succeeded(const Result<T>& result) {
    if (!result) require_good(result.error());
    return result.has_value();
}

}  // namespace qcow::fuzz
