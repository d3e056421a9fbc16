#pragma once
// A file system whose reader runs in a process of its own, without rights.

#include <functional>
#include <memory>

#include "qcow/filesystem.h"

namespace tool {

/// What the confined process does. Its functions run in there: `open` before it gives up its rights, so it may open
/// files; `close` when the file system is closed, after its changes are complete.
struct Confined {
    std::function<qcow::Result<std::shared_ptr<qcow::Disk>>()> open;
    qcow::Access access = qcow::Access::read;
    std::function<qcow::Result<void>()> close = {};
};

/// Starts a process that opens the file system, and returns a FileSystem that asks it. The process can read the files
/// that it has open. It has 1 GiB of memory, and two minutes of processor time for each request. What it answers is
/// not trusted: lengths and names are verified. If it crashes, or takes too long, requests give Errc::corrupt or
/// Errc::limit_exceeded.
/// Thread safety: the calling process must have only one thread.
qcow::Result<std::unique_ptr<qcow::FileSystem>> open_confined(const Confined& confined);

}  // namespace tool
