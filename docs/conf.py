# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Sphinx's settings for the pages that antsibull-docs makes of the plugins and roles (make test-docs)."""

project = "vmbeam.xen"
project_copyright = "vmbeam contributors"
extensions = ["sphinx_antsibull_ext"]
html_theme = "alabaster"
pygments_style = "ansible"
highlight_language = "YAML+Jinja"
default_role = "any"
nitpicky = True
# Pages of ansible-core: their index would have to be fetched.
_CORE = (
    r"ansible_collections\.ansible\.builtin\..*|ansible_configuration_settings|common_return_values|callback_plugins"
)
nitpick_ignore_regex = [("std:ref", _CORE), ("std:envvar", r"ANSIBLE_CACHE_PLUGIN.*")]
