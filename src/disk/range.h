#pragma once

#include <fmt/format.h>

#include "base/bits.h"
#include "base/try.h"
#include "qcow/disk.h"

namespace qcow {

/// Errc::invalid_argument unless [at, at + length) lies within the disk.
Result<void> verify_range(const Disk& disk, GuestOffset at, std::uint64_t length);

/// The error of a request for guest bytes: it is about these, unless it says already which ones it is about.
std::unexpected<Error> unreadable(Error error, GuestOffset at, std::uint64_t length);

/// The error of an encrypted image whose key is not known.
std::unexpected<Error> no_key(const std::string& file);

/// Whether it is about bytes that are lost, and not about a request that may succeed another time.
bool is_loss(const Error& error);

/// What resize says where the disk would lose bytes and the caller did not allow it.
std::unexpected<Error> refuse_to_shrink(const Disk& disk, std::uint64_t size);

}  // namespace qcow
