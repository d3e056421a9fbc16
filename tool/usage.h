#pragma once
// What users are told of the command line: its help, and what they have got wrong.

#include <CLI/CLI.hpp>
#include <string>

namespace tool {

/// Help as all commands show it.
class Help : public CLI::Formatter {
public:
    Help();
    std::string make_option_opts(const CLI::Option* option) const override;
    std::string make_option_desc(const CLI::Option* option) const override;
};

/// "qcow read [OPTIONS] IMAGE OFFSET LENGTH"
std::string usage_of(const CLI::App& app);

/// There is no command of this name; what may have been meant.
std::string unknown_command(const CLI::App& root, const std::string& name);

/// Why the command line that `root` has tried to parse is wrong, and what to do.
std::string explain(const CLI::App& root, const CLI::ParseError& error);

}  // namespace tool
