#pragma once
// A process that unmounts for another one, which is confined or has died.

#include <string>

#include "qcow/error.h"

namespace tool {

/// A process that does nothing until this process asks it to unmount, or ends. It is not confined, and reads nothing of
/// what strangers made. Ending this process by SIGKILL leaves no dead mount either.
class Unmounter {
public:
    Unmounter() = default;
    Unmounter(const Unmounter&) = delete;
    Unmounter& operator=(const Unmounter&) = delete;
    ~Unmounter();

    /// Starts it, for what is mounted on the absolute path `target` now. Errors: Errc::io.
    /// Thread safety: the process must have only one thread.
    qcow::Result<void> start(const std::string& target);

    /// Has it unmount, and waits for that. Without start(), this process unmounts.
    void unmount(const std::string& target) const;

private:
    int socket_ = -1;
};

}  // namespace tool
