// qcow: the command line of qcowkit. Written against the public headers alone.

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <exception>

#include "command.h"

namespace {

int run(int argc, char** argv) {
    CLI::App app("qcow looks into, verifies, converts and changes disk images: qcow2 (versions 2 and 3), qcow and raw.",
                 "qcow");
    app.set_version_flag("-V,--version", "qcow " QCOW_VERSION);
    app.set_help_flag("-h,--help", "Show this help; after a command, the help of that command");
    app.require_subcommand(1);
    app.footer(
        "Sizes and offsets are bytes, or numbers with k, M, G, T, P or E (powers of 1024): 64k, 1.5G.\n"
        "Exit status: 0 done, 1 failed or used wrongly; check has more, see qcow check --help.\n"
        "Examples:\n"
        "  qcow info disk.qcow2                what is this?\n"
        "  qcow check disk.qcow2               is it sound?\n"
        "  qcow convert disk.qcow2 disk.raw    get the contents out");

    int status = tool::ok;
    for (const tool::Declare declare :
         {tool::declare_info, tool::declare_map, tool::declare_check, tool::declare_create, tool::declare_convert,
          tool::declare_read, tool::declare_write, tool::declare_zero, tool::declare_discard, tool::declare_resize,
          tool::declare_snapshot}) {
        declare(app, status);
    }
    const std::string_view first = argc > 1 ? argv[1] : "-";
    const auto commands = app.get_subcommands([](const CLI::App*) { return true; });
    if (!first.starts_with('-') && std::ranges::none_of(commands, [&](auto* c) { return c->get_name() == first; })) {
        tool::complain(fmt::format("there is no command \"{}\" (see qcow --help)", first));
        return tool::failed;
    }
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
        if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
        tool::complain(fmt::format("{} (see qcow --help)", error.what()));
        return tool::failed;
    }
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
        tool::complain("cannot write to standard output");
        return tool::failed;
    }
    return status;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run(argc, argv);
    } catch (const std::exception& error) {
        std::fputs("qcow: ", stderr);
        std::fputs(error.what(), stderr);
        std::fputs("\n", stderr);
        return tool::failed;
    }
}
