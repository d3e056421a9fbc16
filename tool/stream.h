#pragma once
// Guest bytes into something that takes them from front to back, such as a pipe.

#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>

#include "qcow/disk.h"

namespace tool {

/// Whether a target of this name can only be written from front to back: "-" (standard output), a pipe, a terminal or
/// another character device.
bool is_stream(const std::string& path);

/// Writes `length` bytes of the disk from `at` on. `name` is that of `to` in messages.
qcow::Result<void> stream_out(qcow::Disk& disk, qcow::GuestOffset at, std::uint64_t length, std::FILE* to,
                              const std::string& name, const std::function<void(std::uint64_t done)>& progress = {});

/// Writes all of the disk to what is_stream.
qcow::Result<void> stream_to(qcow::Disk& disk, const std::string& path,
                             const std::function<void(std::uint64_t done)>& progress);

}  // namespace tool
