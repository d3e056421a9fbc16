#pragma once
// What the files of a mount do: the operations of libfuse's low-level interface.

#define FUSE_USE_VERSION FUSE_MAKE_VERSION(3, 14)
#include <fuse_lowlevel.h>
#include <sys/stat.h>

#include <cstddef>
#include <functional>
#include <mutex>
#include <set>
#include <span>

#include "base/bits.h"
#include "server/fuse/tree.h"
#include "server/pace.h"

namespace qcow::fuse {

/// The largest read or write that the kernel sends: 256 pages, the kernel's default.
inline constexpr std::size_t max_transfer = 1 * MiB;

/// What the operations work on: the user data of the session.
struct Files {
    Tree tree;
    struct stat mount_point = {};  ///< owner, group and permissions of the files
    std::function<void(const Error&)> failed = {};
    Pace pace = {};  ///< of reads and writes
    std::mutex failures = {};
    std::set<Errc> told = {};  ///< kinds of errors that `failed` has received
};

/// The memory of this thread for the bytes that a program reads: max_transfer bytes.
extern thread_local std::span<std::byte> read_memory;

/// The operations. The user data of their session is Files.
const fuse_lowlevel_ops& operations();

}  // namespace qcow::fuse
