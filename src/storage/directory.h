#pragma once
// A directory that files are opened beneath, and nowhere else, for names that nobody vouches for.

#include <memory>
#include <string>

#include "storage/file.h"

namespace qcow {

/// Immutable: any number of threads may use it. It stays the directory that it was, whatever becomes of its name.
class Directory {
public:
    /// An empty path is the current directory. That it cannot be opened is said by open_file.
    explicit Directory(const std::string& path);

    /// Opens a regular file that lies in the directory or below. The kernel follows `location` (RESOLVE_BENEATH), so
    /// that no "..", absolute path or symbolic link in it leads out, whoever changes them meanwhile; and what is
    /// neither a regular file nor a link to one is not even opened. Errc::refused_by_policy. `name` names the file in
    /// messages.
    [[nodiscard]] Result<std::shared_ptr<Storage>> open_file(const std::string& location, const std::string& name,
                                                             const FileOptions& options) const;

private:
    [[nodiscard]] Result<FileDescriptor> open_beneath(const std::string& location, const std::string& name,
                                                      int flags) const;

    std::string path_;
    FileDescriptor fd_;
    int error_ = 0;
};

}  // namespace qcow
