// qcow control: sends a command to a running server.

#include "running.h"

namespace tool {
namespace {

struct ControlOptions {
    std::string socket;
    std::string command;
    std::vector<std::string> arguments;
};

/// A value that is JSON is that; anything else is a string.
Json value_of(const std::string& text) {
    auto value = Json::parse(text, nullptr, false);
    return value.is_discarded() ? Json(text) : value;
}

qcow::Result<int> run(const ControlOptions& options) {
    Json arguments = Json::object();
    for (const auto& argument : options.arguments) {
        const auto equals = argument.find('=');
        if (equals == 0 || equals == std::string::npos) {
            return std::unexpected(
                qcow::Error{qcow::Errc::invalid_argument, argument, "is not NAME=VALUE, as in size=20000000000"});
        }
        arguments[argument.substr(0, equals)] = value_of(argument.substr(equals + 1));
    }
    print_json(QCOW_TRY(execute(options.socket, options.command, arguments)));
    return ok;
}

}  // namespace

void declare_control(CLI::App& root, int& status) {
    const auto options = std::make_shared<ControlOptions>();
    auto& app = declare(
        root, status, "control", "Send a command to a running server",
        "Sends one command to the socket of qcow serve --control, and prints what it returns as JSON. Values that are\n"
        "JSON (numbers, true, [...], {...}) are sent as they are, others as strings. The server accepts the commands\n"
        "on lines of their own, too: {\"execute\": \"flush\"}. qcow snapshot, bitmap and resize have --control, too.\n"
        "Commands, with the arguments that are not optional:\n"
        "  query-commands                             all commands\n"
        "  query-named-block-nodes                    the images, with their snapshots and bitmaps\n"
        "  flush                                      make completed writes durable\n"
        "  block_resize size=BYTES                    clients see the new size when they connect again\n"
        "  blockdev-snapshot-internal-sync name=NAME\n"
        "  blockdev-snapshot-delete-internal-sync name=NAME\n"
        "  blockdev-snapshot-apply-internal-sync name=NAME\n"
        "  blockdev-snapshot-rename-internal-sync name=NAME new-name=NAME\n"
        "  block-dirty-bitmap-add name=NAME           also -remove, -clear, -enable, -disable\n"
        "  block-dirty-bitmap-merge target=NAME bitmaps='[\"NAME\"]'\n"
        "  quit                                       stop the server\n"
        "If the server has several images, node-name=NAME selects one.\n"
        "Examples:\n"
        "  qcow serve --socket disk.sock --control disk.control --persistent disk.qcow2 &\n"
        "  qcow control disk.control blockdev-snapshot-internal-sync name=monday\n"
        "  qcow control disk.control block_resize size=20000000000",
        [options] { return run(*options); });
    app.add_option("SOCKET", options->socket, "Control socket of the server")->required()->check(name_text);
    app.add_option("COMMAND", options->command, "Name of the command")->required()->check(name_text);
    app.add_option("ARGUMENT", options->arguments, "NAME=VALUE, any number of times");
}

}  // namespace tool
