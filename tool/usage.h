#pragma once
// The help of the command line, and the messages about wrong command lines.

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

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

/// Removes "--" behind the command, and marks the arguments after it, so that CLI11 takes none of them for an option.
/// CLI11 itself ends a command at "--" if the command requires no further argument.
void mark_positionals(std::vector<std::string>& arguments);

/// Lets the positional arguments of a command lose that mark. Called when the command has all of its options.
void unmark_positionals(CLI::App& app);

/// Returns the message for an unknown command, with what may have been meant.
std::string unknown_command(const CLI::App& root, const std::string& name);

/// Returns the message for a command line that `root` could not parse: what is wrong, and what to do.
std::string explain(const CLI::App& root, const CLI::ParseError& error);

}  // namespace tool
