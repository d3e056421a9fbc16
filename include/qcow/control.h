#pragma once
// Commands for images that are in use, as JSON text: snapshots, bitmaps, size. For people and programs that manage a
// running server. Names, arguments and errors follow QEMU's machine protocol (QMP); docs/control.md lists them.

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "qcow/image.h"

namespace qcow {

/// An open image, under the name that commands use.
struct ControlledImage {
    std::string name;
    std::shared_ptr<Image> image;
    bool read_only = false;  ///< what queries say of it
};

/// Executes commands about open images.
///
/// Thread safety: all functions may be called from any number of threads, and while the images are in use. Commands
/// take turns.
class QCOW_API Control {
public:
    /// Bytes of the longest command.
    static constexpr std::size_t max_command = std::size_t{64} << 10;

    /// The names of `images` must be unique. The command "quit" calls `quit`; if that is empty, there is no such
    /// command. Each command ends with a call of `after_command`, which may be empty: the size of an image may have
    /// changed. Both functions must return soon, and not throw.
    explicit Control(std::vector<ControlledImage> images, std::function<void()> quit = {},
                     std::function<void()> after_command = {});
    Control(const Control&) = delete;
    Control& operator=(const Control&) = delete;
    ~Control();

    /// Returns what a server says first: {"QMP": ...}, without the end of the line.
    [[nodiscard]] static std::string greeting();

    /// Executes a command such as {"execute": "block_resize", "arguments": {"size": 1048576}, "id": 7}. Returns one
    /// line without its end: {"return": ...}, or {"error": {"class": ..., "desc": ...}}, with the "id" of the command.
    /// A command that is not valid is answered with an error, too. The function blocks until the command has an effect
    /// that is durable.
    std::string execute(std::string_view command);

private:
    class Commands;
    std::unique_ptr<Commands> commands_;
};

/// Listens on a Unix socket, and executes the commands of its clients, a line each. Answers come in their order.
///
/// Only the owner of the process, and root, can connect. At most 16 clients are connected at a time; others wait. A
/// client that sends more than Control::max_command bytes without the end of a line, or does not read its answers for
/// five seconds, is disconnected.
///
/// Thread safety: stop() may be called from any thread. Other functions: one thread at a time.
class QCOW_API ControlServer {
public:
    /// Makes the socket, with mode 0600. `control` must outlive the server. Errors: see NbdServer::listen_unix.
    static Result<std::unique_ptr<ControlServer>> listen_unix(const std::string& path, Control& control);

    ControlServer(const ControlServer&) = delete;
    ControlServer& operator=(const ControlServer&) = delete;
    /// Removes the socket.
    virtual ~ControlServer() = default;

    /// Serves clients until stop() is called. A command that has begun is completed, and answered. Errors: Errc::io.
    virtual Result<void> run() = 0;

    /// Makes run() return, also a later call of it. Async-signal-safe.
    virtual void stop() noexcept = 0;

protected:
    ControlServer() = default;
};

}  // namespace qcow
