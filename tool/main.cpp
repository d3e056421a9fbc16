// qcow: the command line of qcowkit. Written against the public headers alone.

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <exception>

#include "command.h"

namespace {

int run(int argc, char** argv) {
    int status = tool::ok;
    const auto made = tool::make_app(status);
    auto& app = *made;
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
