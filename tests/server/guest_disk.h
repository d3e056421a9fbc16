#pragma once
// A server of vhost-user-blk in a process of its own: qcow serve, or qemu-storage-daemon as a peer.

#include <memory>
#include <string>

#include "support/qemu.h"
#include "support/temporary_directory.h"
#include "support/vhost/front_end.h"

namespace qcow::test {

enum class Program { qcow, storage_daemon };

class GuestDisk {
public:
    /// Serves a new, empty qcow2 image. `options` are those of qcow serve.
    explicit GuestDisk(Program program = Program::qcow, std::string size = "64M", unsigned queues = 4,
                       Arguments options = {});

    void start();
    /// Stops the server, which must end well.
    void stop();
    /// SIGKILL.
    void kill();

    /// Starts a server that has stopped, with other options.
    void start_with(Arguments options) {
        options_ = std::move(options);
        start();
    }
    void restart(Arguments options) {
        stop();
        start_with(std::move(options));
    }
    void restart_read_only();

    [[nodiscard]] Program program() const { return program_; }
    [[nodiscard]] const std::string& socket() const { return socket_; }
    [[nodiscard]] const std::string& image() const { return image_; }
    [[nodiscard]] const TemporaryDirectory& directory() const { return directory_; }

private:
    TemporaryDirectory directory_;
    Program program_;
    unsigned queues_;
    Arguments options_;
    bool read_only_ = false;
    std::string socket_ = directory_ / "disk.socket";
    std::string image_ = directory_ / "disk.qcow2";
    std::unique_ptr<Subprocess> server_;
};

}  // namespace qcow::test
