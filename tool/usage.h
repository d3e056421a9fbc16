#pragma once
// The help of the command line, and the messages about wrong command lines.

#include <CLI/CLI.hpp>
#include <string>

namespace tool {

/// The layout of the help of all commands.
class Help : public CLI::Formatter {
public:
    Help();
    std::string make_option_opts(const CLI::Option* option) const override;
    std::string make_option_desc(const CLI::Option* option) const override;
};

/// "qcow read [OPTIONS] IMAGE OFFSET LENGTH"
std::string usage_of(const CLI::App& app);

/// Returns the message for an unknown command, with what may have been meant.
std::string unknown_command(const CLI::App& root, const std::string& name);

/// Returns the message for a command line that `root` could not parse: what is wrong, and what to do.
std::string explain(const CLI::App& root, const CLI::ParseError& error);

}  // namespace tool
