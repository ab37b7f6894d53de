# Fails if a translation unit of an instruction set defines a symbol that the linker may merge with another's:
# weak (inline functions and templates with external linkage) or unique ones.
foreach(object ${OBJECTS})
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9a-f]+ [WVuwv] [^\n]*" shared "${symbols}")
  if(shared)
    message(FATAL_ERROR "${object} shares: ${shared}")
  endif()
endforeach()
