#pragma once
// Errors of the tool itself.

#include <expected>
#include <string>
#include <utility>

#include "qcow/error.h"

namespace tool {

inline std::unexpected<qcow::Error> failure(qcow::Errc code, std::string place, std::string what) {
    return std::unexpected(qcow::Error{code, std::move(place), std::move(what)});
}

/// The error of an argument.
inline std::unexpected<qcow::Error> refuse(std::string place, std::string what) {
    return failure(qcow::Errc::invalid_argument, std::move(place), std::move(what));
}

}  // namespace tool
