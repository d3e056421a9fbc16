#pragma once
// Images that a running server has open. Commands reach them through the server's control socket.

#include <string>

#include "command.h"

namespace tool {

/// Where the image is, in place of a file.
struct Running {
    std::string socket;  // empty: the image is a file
    std::string image;   // its name in the server; empty: the only one
    [[nodiscard]] bool named() const { return !socket.empty(); }
};

/// Adds --control and --image-name.
void add_running_options(CLI::App& app, Running& running);

/// Returns the last of the two positional arguments IMAGE and `value`: with --control, IMAGE is left out, and the
/// parser has put the value in its place. Errors: Errc::invalid_argument: one is missing, or there is one too many.
/// `what` names the value.
qcow::Result<std::string> value_without_image(const Running& running, const std::string& image,
                                              const std::string& value, const std::string& what);

/// Sends a command about the image, and returns what the server returns. Errors: those of the server and the socket.
qcow::Result<Json> execute(const Running& running, const std::string& command, Json arguments = Json::object());

/// Returns what the server says of the image: an element of query-named-block-nodes.
qcow::Result<Json> query(const Running& running);

/// Sends a command, and returns what the server returns.
qcow::Result<Json> execute(const std::string& socket, const std::string& command, const Json& arguments);

}  // namespace tool
