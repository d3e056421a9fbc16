// qcow: the command line of qcowkit. Uses only the public headers of the library.

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <exception>
#include <utility>

#include "command.h"
#include "keys.h"
#include "qcow/text.h"
#include "usage.h"

namespace {

/// Gives closed standard streams a file. Otherwise an image would get one of their numbers, and messages would be
/// written into it. Input and output still fail, as closed streams do. Messages are lost.
void open_standard_streams() {
    for (const auto& [stream, mode] :
         {std::pair{STDIN_FILENO, O_WRONLY}, {STDOUT_FILENO, O_RDONLY}, {STDERR_FILENO, O_WRONLY}}) {
        if (fcntl(stream, F_GETFD) >= 0) continue;
        // A new file gets the lowest number that is free, which is that of the stream.
        if (open("/dev/null", mode) != stream) _exit(tool::failed);
    }
}

/// Raises the limit of open files, because a backing chain needs a descriptor for each of its files.
void allow_long_chains() {
    rlimit limit = {};
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

int run(int argc, char** argv) {
    int status = tool::ok;
    const std::string_view first = argc > 1 ? argv[1] : "-";
    const auto made = tool::make_app(status, first);
    auto& app = *made;
    const auto commands = app.get_subcommands([](const CLI::App*) { return true; });
    if (!first.starts_with('-') && std::ranges::none_of(commands, [&](auto* c) { return c->get_name() == first; })) {
        tool::complain(qcow::printable(tool::unknown_command(app, std::string(first))));
        return tool::failed;
    }
    try {
        auto arguments = tool::take_arguments(argc, argv);
        tool::mark_positionals(arguments);
        std::ranges::reverse(arguments);  // CLI11 takes them from the end
        app.parse(std::move(arguments));
    } catch (const CLI::ParseError& error) {
        if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
        tool::complain(qcow::printable(tool::explain(app, error)));
        return tool::failure_of(first);
    }
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
        tool::complain("cannot write to standard output");
        return tool::failure_of(first);
    }
    return status;
}

}  // namespace

int main(int argc, char** argv) {
    open_standard_streams();
    std::signal(SIGXFSZ, SIG_IGN);  // writes past a file size limit then fail, like those to a full file system
    try {
        allow_long_chains();
        return run(argc, argv);
    } catch (const std::exception& error) {
        std::fputs("qcow: ", stderr);
        std::fputs(error.what(), stderr);
        std::fputs("\n", stderr);
        return tool::failure_of(argc > 1 ? argv[1] : "");
    }
}
